//! What the kernel tells a program when it executes: the vector behind its environment, from which it
//! learns where the vDSO is.

use nix::sys::ptrace;
use nix::unistd::Pid;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Types of entries (getauxval(3)): one that nobody reads, and the address of the vDSO.
const AT_IGNORE: u64 = 1;
const AT_SYSINFO_EHDR: u64 = 33;
/// Size of a word in bytes.
const WORD: u64 = 8;
/// Most words that are looked at: arguments, environment and vector of a process of ours are few.
const WORDS_MAX: usize = 8192;

/// Makes a program that has just executed believe that there is no vDSO, as its C library does where the
/// kernel offers none: it then asks the kernel for the time.
pub(super) fn hide_vdso(pid: Pid) -> io::Result<()> {
    let stack = ptrace::getregs(pid)?.rsp;
    let memory = File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/{pid}/mem"))?;
    let word = |n: u64| {
        let mut bytes = [0; 8];
        memory.read_exact_at(&mut bytes, stack + WORD * n)?;
        Ok::<_, io::Error>(u64::from_ne_bytes(bytes))
    };
    let mut words = Vec::new();
    for n in 0.. {
        words.push(word(n)?);
        if let Some(place) = vdso(&words) {
            let ignored = AT_IGNORE.to_ne_bytes();
            return memory.write_all_at(&ignored, stack + WORD * place);
        }
        if words.len() >= WORDS_MAX {
            break;
        }
    }
    Err(io::Error::other("no vDSO in the auxiliary vector"))
}

/// Where in the words of a new stack the type of the entry for the vDSO is, once all of it is there: the
/// number of arguments, the arguments, 0, the environment, 0, then pairs of type and value.
fn vdso(words: &[u64]) -> Option<u64> {
    let arguments = usize::try_from(*words.first()?).ok()?;
    let environment = arguments.checked_add(2)?;
    let rest = words.get(environment..)?;
    let vector = environment + rest.iter().position(|&word| word == 0)? + 1;
    let (pairs, _) = words.get(vector..)?.as_chunks::<2>();
    let pair = pairs.iter().position(|&[is, _]| is == AT_SYSINFO_EHDR)?;
    u64::try_from(vector + 2 * pair).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vdso_is_found_behind_arguments_and_environment() {
        // Two arguments and one variable, whose addresses look like types of entries.
        let words = [2, 33, 33, 0, 33, 0, 6, 4096, 33, 0x7fff_0000, 0, 0];
        assert_eq!(vdso(&words), Some(8));
        for shorter in 0..10 {
            assert_eq!(vdso(&words[..shorter]), None, "{shorter}");
        }
        assert_eq!(vdso(&[u64::MAX, 0, 0]), None);
    }
}
