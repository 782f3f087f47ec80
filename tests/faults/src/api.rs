//! The operations of the daemon's HTTP API, as points know them.

/// Method, path behind `/v1`, name of the point.
const OPERATIONS: [(&str, &str, &str); 31] = [
    ("GET", "/version", "api.version"),
    ("GET", "/vms", "api.list"),
    ("POST", "/vms", "api.create"),
    ("GET", "/vms/{name}", "api.inspect"),
    ("DELETE", "/vms/{name}", "api.remove"),
    ("POST", "/vms/{name}/start", "api.start"),
    ("POST", "/vms/{name}/stop", "api.stop"),
    ("POST", "/vms/{name}/kill", "api.kill"),
    ("POST", "/vms/{name}/restart", "api.restart"),
    ("POST", "/vms/{name}/reset", "api.reset"),
    ("POST", "/vms/{name}/pause", "api.pause"),
    ("POST", "/vms/{name}/resume", "api.resume"),
    ("GET", "/vms/{name}/wait", "api.wait"),
    ("GET", "/vms/{name}/stats", "api.stats"),
    ("GET", "/vms/{name}/events", "api.events"),
    ("GET", "/vms/{name}/output", "api.output"),
    ("GET", "/vms/{name}/console", "api.console"),
    ("GET", "/vms/{name}/devices", "api.devices"),
    (
        "POST",
        "/vms/{name}/devices/{device}/restart",
        "api.restart-device",
    ),
    (
        "POST",
        "/vms/{name}/devices/{device}/upgrade",
        "api.upgrade-device",
    ),
    (
        "POST",
        "/vms/{name}/devices/{device}/limit",
        "api.limit-device",
    ),
    (
        "POST",
        "/vms/{name}/devices/{device}/link",
        "api.link-device",
    ),
    (
        "POST",
        "/vms/{name}/devices/{device}/resize",
        "api.resize-device",
    ),
    (
        "POST",
        "/vms/{name}/devices/{device}/medium",
        "api.change-medium",
    ),
    ("GET", "/vms/{name}/vsock", "api.vsock"),
    ("GET", "/networks", "api.networks"),
    ("POST", "/networks", "api.create-network"),
    ("GET", "/networks/{name}", "api.show-network"),
    ("DELETE", "/networks/{name}", "api.remove-network"),
    ("GET", "/networks/{name}/capture", "api.capture-network"),
    ("POST", "/host/shutdown", "api.shutdown-host"),
];

/// The names of all operations.
pub fn names() -> impl Iterator<Item = &'static str> {
    OPERATIONS.iter().map(|(_, _, name)| *name)
}

/// What a request asks for, and of which machine. `None` when it is no operation.
#[must_use]
pub fn operation(request: &[u8]) -> Option<(&'static str, Option<String>)> {
    let line = request.split(|&byte| byte == b'\r').next()?;
    let mut words = std::str::from_utf8(line).ok()?.split(' ');
    let (method, target) = (words.next()?, words.next()?);
    let path = target.split('?').next()?.strip_prefix("/v1")?;
    let of = |(wanted, template, name): &(&str, &str, &'static str)| {
        let vm = (*wanted == method).then(|| matches(template, path))??;
        // What is named there is no machine.
        let vm = vm.filter(|_| !template.starts_with("/networks"));
        Some((*name, vm))
    };
    OPERATIONS.iter().find_map(of)
}

/// The machine in a path that is like a template.
fn matches(template: &str, path: &str) -> Option<Option<String>> {
    if template.split('/').count() != path.split('/').count() {
        return None;
    }
    let mut vm = None;
    for (wanted, found) in template.split('/').zip(path.split('/')) {
        match wanted {
            "{name}" => vm = Some(found.to_owned()),
            "{device}" => {}
            wanted if wanted == found => {}
            _ => return None,
        }
    }
    Some(vm)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_route_of_the_api_is_a_point() {
        let routes = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../broker/src/serve/routes.rs"
        );
        let text = std::fs::read_to_string(routes).unwrap();
        let mut found = BTreeSet::new();
        for route in text.split(".route(").skip(1) {
            let path = route.split('"').nth(1).unwrap();
            // Up to the next call of the builder's own.
            let handlers = route.split("\n        .").next().unwrap();
            for (call, method) in [("get(", "GET"), ("post(", "POST"), ("delete(", "DELETE")] {
                if handlers.contains(call) {
                    found.insert((method.to_owned(), path.trim_start_matches("/v1").to_owned()));
                }
            }
        }
        let known = OPERATIONS.iter();
        let known = known.map(|(method, path, _)| ((*method).to_owned(), (*path).to_owned()));
        assert_eq!(found, known.collect());
    }

    #[test]
    fn requests_are_told_apart() {
        let of = |line: &str| operation(format!("{line} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes());
        let web = || Some("web".to_owned());
        assert_eq!(of("GET /v1/vms"), Some(("api.list", None)));
        assert_eq!(of("POST /v1/vms"), Some(("api.create", None)));
        assert_eq!(of("GET /v1/vms/web"), Some(("api.inspect", web())));
        assert_eq!(
            of("DELETE /v1/vms/web?force=true"),
            Some(("api.remove", web()))
        );
        assert_eq!(
            of("POST /v1/vms/web/devices/disk0/restart"),
            Some(("api.restart-device", web()))
        );
        for wrong in [
            "GET /vms",
            "PUT /v1/vms",
            "GET /v1/vms/web/nothing",
            "GET",
            "",
        ] {
            assert_eq!(of(wrong), None, "{wrong}");
        }
        assert_eq!(operation(&[0xff, 0xfe]), None);
    }
}
