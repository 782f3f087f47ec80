//! The server under the FUSE client of Linux, over `/dev/fuse`: what programs see of a shared folder.
//! Needs root, since it mounts, in a mount namespace of its own.

#[cfg(test)]
mod tests {
    use bulkhead_fs::{Access, REQUEST_BYTES_MAX, Server, Terms};
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};
    use std::fs::{self, File, OpenOptions};
    use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::path::Path;

    /// Answers requests until the mount is gone.
    fn serve(mut device: &File, folder: &Path, access: Access) {
        let folder = File::open(folder).unwrap().into();
        let mut server = Server::new(folder, access, Terms::default(), None).unwrap();
        let (mut request, mut answer) = (vec![0; REQUEST_BYTES_MAX], Vec::new());
        loop {
            match device.read(&mut request) {
                Ok(n) => {
                    server.serve(&request[..n], REQUEST_BYTES_MAX, &mut answer);
                    // An answer to a request that was interrupted has no taker.
                    if !answer.is_empty() {
                        let _ = device.write(&answer);
                    }
                }
                Err(e) if e.raw_os_error() == Some(nix::libc::ENODEV) => return,
                Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::NotFound) => {}
                Err(e) => panic!("/dev/fuse: {e}"),
            }
        }
    }

    /// Runs `claims` on a mount of `folder`; both are threads in one mount namespace.
    fn mounted(folder: &Path, access: Access, claims: impl FnOnce(&Path) + Send) {
        // Others may not mount; what they can test is in `src/server_tests.rs`.
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        std::thread::scope(|threads| {
            let run = threads.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNS).unwrap();
                let none = None::<&str>;
                mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
                let at = tempfile::tempdir().unwrap();
                let device = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open("/dev/fuse")
                    .unwrap();
                let fd = device.as_raw_fd();
                let options =
                    format!("fd={fd},rootmode=40000,user_id=0,group_id=0,default_permissions");
                mount(
                    Some("folder"),
                    at.path(),
                    Some("fuse"),
                    MsFlags::empty(),
                    Some(options.as_str()),
                )
                .unwrap();
                std::thread::scope(|inner| {
                    let server = inner.spawn(|| serve(&device, folder, access));
                    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                        claims(at.path())
                    }));
                    nix::mount::umount2(at.path(), nix::mount::MntFlags::MNT_DETACH).unwrap();
                    server.join().unwrap();
                    outcome.unwrap();
                });
            });
            run.join().unwrap();
        });
    }

    #[test]
    #[expect(
        clippy::disallowed_methods,
        reason = "the suite is the test's own, not a part of the program"
    )]
    fn shell_finds_the_semantics_of_a_file_system() {
        const SUITE: &str = include_str!("../../../tests/e2e/share_suite.sh");
        let folder = tempfile::tempdir().unwrap();
        mounted(folder.path(), Access::ReadWrite, |at| {
            let mut shell = std::process::Command::new("sh");
            let done = shell.args(["-c", SUITE, "suite"]).arg(at).output().unwrap();
            let told = String::from_utf8_lossy(&done.stdout).into_owned();
            assert_eq!(told, "SUITE-DONE\n", "{done:?}");
        });
    }

    #[test]
    fn programs_find_the_semantics_of_a_file_system() {
        let folder = tempfile::tempdir().unwrap();
        let host = folder.path();
        mounted(host, Access::ReadWrite, |guest| {
            let data: Vec<u8> = (0..5_000_000u32).map(|n| (n % 253) as u8).collect();
            fs::create_dir_all(guest.join("a/b")).unwrap();
            fs::write(guest.join("a/b/f"), &data).unwrap();
            assert!(fs::read(host.join("a/b/f")).unwrap() == data);
            assert!(fs::read(guest.join("a/b/f")).unwrap() == data);
            // A second maker is refused; appending and seeking.
            let again = OpenOptions::new()
                .write(true)
                .create_new(true)
                .open(guest.join("a/b/f"));
            assert_eq!(again.unwrap_err().kind(), ErrorKind::AlreadyExists);
            let mut end = OpenOptions::new()
                .append(true)
                .read(true)
                .open(guest.join("a/b/f"))
                .unwrap();
            end.write_all(b"tail").unwrap();
            end.sync_all().unwrap();
            end.seek(SeekFrom::End(-4)).unwrap();
            let mut tail = String::new();
            end.read_to_string(&mut tail).unwrap();
            assert_eq!(tail, "tail");
            // Renamed while open, and its folder too.
            fs::rename(guest.join("a/b/f"), guest.join("a/g")).unwrap();
            fs::rename(guest.join("a"), guest.join("c")).unwrap();
            assert_eq!(end.metadata().unwrap().len(), 5_000_004);
            assert_eq!(fs::metadata(guest.join("c/g")).unwrap().len(), 5_000_004);
            // Truncated, linked, its mode set.
            end.set_len(3).unwrap();
            fs::hard_link(guest.join("c/g"), guest.join("h")).unwrap();
            assert_eq!(fs::metadata(guest.join("h")).unwrap().nlink(), 2);
            fs::set_permissions(guest.join("h"), fs::Permissions::from_mode(0o600)).unwrap();
            assert_eq!(
                fs::metadata(host.join("c/g")).unwrap().mode() & 0o7777,
                0o600
            );
            // Removed while open, it is still read and written.
            let mut open = OpenOptions::new()
                .read(true)
                .write(true)
                .open(guest.join("h"))
                .unwrap();
            fs::remove_file(guest.join("h")).unwrap();
            fs::remove_file(guest.join("c/g")).unwrap();
            open.write_all(b"xyz!").unwrap();
            open.rewind().unwrap();
            let mut text = String::new();
            open.read_to_string(&mut text).unwrap();
            assert_eq!(text, "xyz!");
            // Links are followed in the guest's tree, so this one leads to the guest's own file.
            symlink("c/target", guest.join("link")).unwrap();
            fs::write(guest.join("link"), "through").unwrap();
            assert_eq!(
                fs::read_to_string(host.join("c/target")).unwrap(),
                "through"
            );
            let kept = fs::remove_dir(guest.join("c"));
            assert_eq!(kept.unwrap_err().kind(), ErrorKind::DirectoryNotEmpty);
            for n in 0..300 {
                fs::write(guest.join(format!("c/{n}")), "").unwrap();
            }
            assert_eq!(fs::read_dir(guest.join("c")).unwrap().count(), 302);
            // What the host does is seen at once.
            fs::remove_file(host.join("c/7")).unwrap();
            fs::write(host.join("c/8"), "new").unwrap();
            assert!(!guest.join("c/7").exists());
            assert_eq!(fs::read_to_string(guest.join("c/8")).unwrap(), "new");
            fs::remove_dir_all(guest.join("c")).unwrap();
            assert_eq!(fs::read_dir(host).unwrap().count(), 1);
        });
    }

    #[test]
    fn programs_cannot_change_a_read_only_folder() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("f"), "kept").unwrap();
        mounted(folder.path(), Access::ReadOnly, |guest| {
            let refused = |done: std::io::Result<()>| {
                assert_eq!(done.unwrap_err().kind(), ErrorKind::ReadOnlyFilesystem);
            };
            refused(fs::write(guest.join("f"), "new"));
            refused(fs::write(guest.join("g"), "new"));
            refused(fs::remove_file(guest.join("f")));
            refused(fs::create_dir(guest.join("d")));
            refused(fs::rename(guest.join("f"), guest.join("g")));
            assert_eq!(fs::read_to_string(guest.join("f")).unwrap(), "kept");
        });
    }
}
