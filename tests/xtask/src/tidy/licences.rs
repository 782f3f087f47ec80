//! Checks licences, duplicates and origins of all dependencies against `deny.toml`.
//!
//! The file has cargo-deny's format, so that `cargo deny check licenses bans sources` says the same;
//! building cargo-deny itself would take longer than all our tests.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use serde::Deserialize;

use super::spdx;
use crate::command;
use crate::workspace::SourceFile;

const RULES: &str = "deny.toml";

#[derive(Deserialize)]
struct Rules {
    licenses: Licenses,
    bans: Bans,
    sources: Sources,
}

#[derive(Deserialize)]
struct Licenses {
    allow: BTreeSet<String>,
}

#[derive(Deserialize)]
struct Bans {
    deny: Vec<Named>,
    skip: Vec<Named>,
}

#[derive(Deserialize)]
struct Named {
    #[serde(rename = "crate")]
    name: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Sources {
    allow_registry: BTreeSet<String>,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    source: Option<String>,
}

/// Complaints about dependencies.
pub(super) fn check(files: &[SourceFile]) -> Result<Vec<String>> {
    let rules = files
        .iter()
        .find(|file| file.path == RULES)
        .context("there is no deny.toml")?;
    let rules: Rules = toml::from_str(&rules.text).context(RULES)?;
    let metadata = command::output(command::cargo().args([
        "metadata",
        "--format-version=1",
        "--locked",
        "--filter-platform=x86_64-unknown-linux-gnu",
    ]))?;
    let metadata: Metadata = serde_json::from_str(&metadata)?;
    Ok(complaints(&rules, &metadata.packages))
}

fn complaints(rules: &Rules, packages: &[Package]) -> Vec<String> {
    let mut complaints = Vec::new();
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in packages {
        let Package { name, version, .. } = package;
        versions.entry(name).or_default().push(version);
        // Packages of the workspace have no source; their licence is checked like any other.
        if let Some(source) = &package.source {
            let registry = source.strip_prefix("registry+").unwrap_or(source);
            if !rules.sources.allow_registry.contains(registry) {
                complaints.push(format!("{name} {version}: comes from {source}"));
            }
        }
        let licence = package.license.as_deref().unwrap_or_default();
        match spdx::satisfied(licence, &rules.licenses.allow) {
            Ok(true) => {}
            Ok(false) => complaints.push(format!("{name} {version}: licence {licence}")),
            Err(error) => complaints.push(format!("{name} {version}: {error}")),
        }
    }
    for (name, versions) in &versions {
        let named = |list: &[Named]| list.iter().any(|entry| matches(&entry.name, name));
        if named(&rules.bans.deny) {
            complaints.push(format!("{name} {}: denied by {RULES}", versions.join(", ")));
        }
        if versions.len() > 1 && !named(&rules.bans.skip) {
            complaints.push(format!("{name}: several versions: {}", versions.join(", ")));
        }
    }
    complaints
}

/// Whether a `name` or `name@version` of the rules means the package.
fn matches(rule: &str, name: &str) -> bool {
    rule.split('@').next() == Some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        toml::from_str(
            "[licenses]\nallow = [\"MIT\"]\n[bans]\ndeny = [{ crate = \"bad\" }]\n\
             skip = [{ crate = \"twice\" }]\n[sources]\nallow-registry = [\"https://good\"]\n",
        )
        .unwrap()
    }

    fn package(name: &str, version: &str, license: &str, source: Option<&str>) -> Package {
        Package {
            name: name.to_owned(),
            version: version.to_owned(),
            license: (!license.is_empty()).then(|| license.to_owned()),
            source: source.map(str::to_owned),
        }
    }

    #[test]
    fn good_dependencies_raise_no_complaint() {
        let packages = [
            package("ours", "1.0.0", "MIT", None),
            package(
                "one",
                "1.0.0",
                "MIT OR GPL-3.0-only",
                Some("registry+https://good"),
            ),
            package("twice", "1.0.0", "MIT", Some("registry+https://good")),
            package("twice", "2.0.0", "MIT", Some("registry+https://good")),
        ];
        assert_eq!(complaints(&rules(), &packages), Vec::<String>::new());
    }

    #[test]
    fn each_fault_is_found() {
        let good = Some("registry+https://good");
        for (packages, fault) in [
            (
                vec![package("a", "1.0.0", "GPL-3.0-only", good)],
                "licence GPL-3.0-only",
            ),
            (
                vec![package("a", "1.0.0", "", good)],
                "a licence is missing",
            ),
            (
                vec![package("a", "1.0.0", "MIT", Some("git+https://good"))],
                "comes from",
            ),
            (
                vec![package("a", "1.0.0", "MIT", Some("registry+https://bad"))],
                "comes from",
            ),
            (vec![package("bad", "1.0.0", "MIT", good)], "denied"),
            (
                vec![
                    package("a", "1.0.0", "MIT", good),
                    package("a", "2.0.0", "MIT", good),
                ],
                "several versions: 1.0.0, 2.0.0",
            ),
        ] {
            let complaints = complaints(&rules(), &packages);
            assert!(
                complaints.len() == 1 && complaints[0].contains(fault),
                "{complaints:?}"
            );
        }
    }
}
