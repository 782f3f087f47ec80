//! Writes initramfs archives: cpio in the `newc` format, uncompressed, the same bytes each time.
//!
//! Written here rather than by the `cpio` program so that device nodes need no root, and so that
//! owner, times and order do not depend on the machine.

/// An archive that is being written.
#[derive(Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

/// What a new entry is.
enum Kind {
    Folder,
    File { mode: u32 },
    Link,
    CharacterDevice { major: u32, minor: u32 },
}

impl Archive {
    /// Adds a folder; its parents come first.
    pub(crate) fn folder(&mut self, path: &str) {
        self.entry(path, &Kind::Folder, &[]);
    }

    /// Adds a file that everybody may read.
    pub(crate) fn file(&mut self, path: &str, content: &[u8]) {
        self.entry(path, &Kind::File { mode: 0o644 }, content);
    }

    /// Adds a file that everybody may execute.
    pub(crate) fn program(&mut self, path: &str, content: &[u8]) {
        self.entry(path, &Kind::File { mode: 0o755 }, content);
    }

    /// Adds a symbolic link.
    pub(crate) fn link(&mut self, path: &str, target: &str) {
        self.entry(path, &Kind::Link, target.as_bytes());
    }

    /// Adds a character device that root may use.
    pub(crate) fn character_device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, &Kind::CharacterDevice { major, minor }, &[]);
    }

    /// Ends the archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entries = 0;
        self.record("TRAILER!!!", 0, 1, (0, 0), &[]);
        // The kernel reads whole blocks from boot loaders that pad.
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }

    fn entry(&mut self, path: &str, kind: &Kind, content: &[u8]) {
        self.entries += 1;
        let (mode, links, device) = match *kind {
            Kind::Folder => (0o040_755, 2, (0, 0)),
            Kind::File { mode } => (0o100_000 | mode, 1, (0, 0)),
            Kind::Link => (0o120_777, 1, (0, 0)),
            Kind::CharacterDevice { major, minor } => (0o020_600, 1, (major, minor)),
        };
        self.record(path, mode, links, device, content);
    }

    fn record(&mut self, path: &str, mode: u32, links: u32, device: (u32, u32), content: &[u8]) {
        let fields = [
            self.entries, // inode
            mode,
            0, // uid
            0, // gid
            links,
            0, // modification time
            size(content.len()),
            0, // device that holds the file, major and minor
            0,
            device.0,
            device.1,
            size(path.len() + 1),
            0, // checksum, unused in this format
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

fn size(length: usize) -> u32 {
    u32::try_from(length).expect("an initramfs holds no files of 4 GiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpio_extracts_what_was_added() {
        if !crate::packages::which("cpio") {
            return;
        }
        let mut archive = Archive::default();
        archive.folder("etc");
        archive.program("etc/hello", b"#!/bin/sh\n");
        archive.file("etc/data", b"12345");
        archive.link("link", "etc/hello");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("archive.cpio");
        std::fs::write(&path, archive.finish()).unwrap();
        let mut cpio = crate::command::command("cpio");
        cpio.args(["-i", "--quiet", "-F"])
            .arg(&path)
            .current_dir(folder.path());
        crate::command::run(&mut cpio).unwrap();
        assert_eq!(
            std::fs::read(folder.path().join("link")).unwrap(),
            b"#!/bin/sh\n"
        );
        assert_eq!(
            std::fs::read(folder.path().join("etc/data")).unwrap(),
            b"12345"
        );
    }

    #[test]
    fn headers_and_contents_start_at_multiples_of_four() {
        let mut archive = Archive::default();
        archive.file("a", b"x");
        let bytes = archive.finish();
        // 110 bytes of header and "a\0" are padded to 112; one byte of content to 116.
        assert_eq!(bytes[112], b'x');
        assert_eq!(&bytes[116..122], b"070701");
        assert_eq!(bytes.len() % 512, 0);
    }
}
