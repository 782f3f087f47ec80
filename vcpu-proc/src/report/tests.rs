//! Claims about crash reports and cores.

use std::process::Command;

use kvm_bindings::kvm_segment;
use proptest::prelude::*;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use super::{Symbols, VcpuState, core, crash_report, escaped};

type Memory = GuestMemoryMmap<()>;

const KERNEL: u64 = 0xffff_ffff_8000_0000;
const CODE: u64 = 0x10_0000;

/// 4 MiB, the first 2 MiB of which the kernel sees at its usual address, all of it one to one.
fn machine() -> (Memory, VcpuState) {
    let mem = Memory::from_ranges(&[(GuestAddress(0), 4 << 20)]).expect("anonymous memory");
    let put = |at: u64, entry: u64| mem.write_obj(entry, GuestAddress(at)).expect("in range");
    put(0x1000, 0x2003);
    put(0x1ff8, 0x4003);
    put(0x2000, 0x3003);
    put(0x3000, 0x83);
    put(0x3008, 0x20_0083);
    put(0x4ff0, 0x5003);
    put(0x5000, 0x83);
    // 64-bit gate of vector 14.
    put(0x6000 + 14 * 16, 0x8000_8e00_0010_1234);
    put(0x6000 + 14 * 16 + 8, 0xffff_ffff);
    put(0x7010, 0x00af_9b00_0000_ffff);
    // push rbp; mov rbp, rsp; mov rax, [rax]; ud2; ret
    let code = [0x55, 0x48, 0x89, 0xe5, 0x48, 0x8b, 0x00, 0x0f, 0x0b, 0xc3];
    mem.write_slice(&code, GuestAddress(CODE))
        .expect("in range");
    let mut state = VcpuState::default();
    let s = &mut state.sregs;
    (s.cr0, s.cr3, s.cr4, s.efer) = (0x8001_0033, 0x1000, 0x6a0, 0xd01);
    s.cr2 = 0xdead_b000;
    s.cs = kvm_segment {
        selector: 0x10,
        l: 1,
        present: 1,
        s: 1,
        type_: 11,
        ..Default::default()
    };
    (s.idt.base, s.idt.limit) = (KERNEL + 0x6000, 0xfff);
    (s.gdt.base, s.gdt.limit) = (KERNEL + 0x7000, 0x1f);
    state.regs.rip = KERNEL + CODE + 4;
    state.regs.rsp = KERNEL + 0x9000;
    state.regs.rax = 0x1122_3344_5566_7788;
    state.regs.rflags = 0x46;
    (mem, state)
}

#[test]
fn report_shows_registers_tables_walks_and_code() {
    let (mem, state) = machine();
    let report = crash_report("triple fault", &[state], &mem, None);
    for expected in [
        "guest crashed: triple fault",
        "rax 1122334455667788",
        "cr2 00000000deadb000",
        "Level4 paging, ring 0",
        "0010: 00af9b000000ffff",
        "vector 14: 0010:ffffffff80001234  attributes 8e00",
        "page walk of cr2 00000000deadb000:",
        "entry of level 3 is not present",
        "level 2: 0000000000000083 at 0x5000",
        "guest-physical 0x100004, page of 2048 KiB, supervisor, writable, executable",
        "       ffffffff80100001: 48 89 e5",
        "    => ffffffff80100004: 48 8b 00",
        "mov rax,[rax]",
        "ud2",
    ] {
        assert!(
            report.contains(expected),
            "{expected:?} is not in\n{report}"
        );
    }
}

#[test]
fn text_of_unknown_origin_is_escaped_and_bounded() {
    assert_eq!(
        escaped("a b\u{1b}[31m\n\u{7f}é"),
        "a b\\u{1b}[31m\\n\\u{7f}\\u{e9}"
    );
    assert!(escaped(&"x".repeat(10_000)).len() < 300);
}

/// The smallest ELF file with one symbol: a null section, a symbol table, a string table.
fn elf_with_symbol(name: &str, address: u64) -> Vec<u8> {
    let mut strings = vec![0];
    strings.extend_from_slice(name.as_bytes());
    strings.push(0);
    let symbols_at = 64_u64;
    let strings_at = symbols_at + 48;
    let sections_at = (strings_at + strings.len() as u64).next_multiple_of(8);
    let mut out = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let push = |out: &mut Vec<u8>, words: &[(u64, usize)]| {
        for (word, len) in words {
            out.extend_from_slice(&word.to_le_bytes()[..*len]);
        }
    };
    push(
        &mut out,
        &[
            (2, 2),
            (62, 2),
            (1, 4),
            (0, 8),
            (0, 8),
            (sections_at, 8),
            (0, 4),
        ],
    );
    push(
        &mut out,
        &[(64, 2), (56, 2), (0, 2), (64, 2), (3, 2), (2, 2)],
    );
    out.resize(out.len() + 24, 0);
    push(
        &mut out,
        &[(1, 4), (0x12, 1), (0, 1), (1, 2), (address, 8), (16, 8)],
    );
    out.extend_from_slice(&strings);
    out.resize(usize::try_from(sections_at).expect("small"), 0);
    out.resize(out.len() + 64, 0);
    let section = |kind: u64, at: u64, len: u64, link: u64, info: u64, entry: u64| {
        [
            (0, 4),
            (kind, 4),
            (0, 8),
            (0, 8),
            (at, 8),
            (len, 8),
            (link, 4),
            (info, 4),
            (8, 8),
            (entry, 8),
        ]
    };
    push(&mut out, &section(2, symbols_at, 48, 2, 1, 24));
    push(
        &mut out,
        &section(3, strings_at, strings.len() as u64, 0, 0, 0),
    );
    out
}

fn file_with(bytes: &[u8]) -> std::fs::File {
    let mut file = tempfile::tempfile().expect("temporary file");
    std::io::Write::write_all(&mut file, bytes).expect("space");
    file
}

#[test]
fn symbols_of_the_kernel_are_shown_demangled_and_escaped() {
    let (mem, state) = machine();
    for (name, shown) in [
        ("do_bad_things", "<do_bad_things+0x4>"),
        ("_ZN6kernel4oops17h0123456789abcdefE", "<kernel::oops+0x4>"),
        ("\u{1b}[2Jx", "<\\u{1b}[2Jx+0x4>"),
    ] {
        let symbols = Symbols::new(file_with(&elf_with_symbol(name, KERNEL + CODE)));
        assert_eq!(symbols.count().expect("an ELF file"), 1);
        let report = crash_report("panic", &[state], &mem, Some(&symbols));
        assert!(report.contains(shown), "{shown:?} is not in\n{report}");
    }
}

#[test]
fn a_file_without_symbols_gives_a_report_without_symbols() {
    let (mem, state) = machine();
    let symbols = Symbols::new(file_with(b"MZ not an ELF file"));
    assert!(symbols.count().is_err());
    let report = crash_report("panic", &[state], &mem, Some(&symbols));
    assert_eq!(report, crash_report("panic", &[state], &mem, None));
}

#[test]
fn gdb_opens_the_core_and_shows_registers_and_memory() {
    let (mem, mut state) = machine();
    mem.write_obj(0x0bad_cafe_1234_5678_u64, GuestAddress(0x30_0008))
        .expect("in range");
    let mut second = state;
    (state.index, second.index) = (0, 1);
    second.regs.rip = KERNEL + CODE + 7;
    second.regs.r15 = 0x5151;
    let path = tempfile::NamedTempFile::new().expect("temporary file");
    core::write(path.as_file(), &[state, second], &mem).expect("space");
    #[expect(
        clippy::disallowed_methods,
        reason = "a test that looks with a debugger"
    )]
    let gdb = Command::new("gdb")
        .args(["-batch", "-nx", "-ex", "info threads", "-ex", "thread 1"])
        .args([
            "-ex",
            "info registers rax rip",
            "-ex",
            "x/2i $rip",
            "-ex",
            "x/1gx 0x300008",
        ])
        .args([
            "-ex",
            "thread 2",
            "-ex",
            "info registers r15",
            "-ex",
            "x/1i $rip",
            "-c",
        ])
        .arg(path.path())
        .output()
        .expect("gdb is installed (cargo xtask test installs it)");
    let text = String::from_utf8_lossy(&gdb.stdout);
    for expected in [
        "0x1122334455667788",
        "0xffffffff80100004",
        "mov    (%rax),%rax",
        "0x0bad_cafe_1234_5678".replace('_', "").as_str(),
        "r15            0x5151",
        "=> 0xffffffff80100007:\tud2",
    ] {
        let complaints = String::from_utf8_lossy(&gdb.stderr);
        assert!(
            text.contains(expected),
            "{expected:?} is not in\n{text}\n{complaints}"
        );
    }
}

#[test]
fn pages_of_zeros_take_no_space() {
    use std::os::unix::fs::MetadataExt as _;
    let (mem, state) = machine();
    let file = tempfile::tempfile().expect("temporary file");
    core::write(&file, &[state], &mem).expect("space");
    let metadata = file.metadata().expect("open file");
    assert!(metadata.len() > 4 << 20, "the file describes all of memory");
    assert!(
        metadata.blocks() * 512 < 256 << 10,
        "{} blocks",
        metadata.blocks()
    );
}

fn hostile_state() -> impl Strategy<Value = VcpuState> {
    let word = || {
        prop_oneof![
            any::<u64>(),
            0..0x1_0000_u64,
            Just(u64::MAX),
            Just(0xffff_8000_0000_0000)
        ]
    };
    let flags = || {
        prop_oneof![
            Just(0x8001_0033_u64),
            Just(0x11),
            Just(0x8000_0001),
            any::<u64>()
        ]
    };
    let efer = || prop_oneof![Just(0xd01_u64), Just(0), any::<u64>()];
    (
        (word(), word(), word(), word()),
        (flags(), word(), word(), efer()),
        any::<[u8; 4]>(),
        any::<u16>(),
    )
        .prop_map(
            |((rip, rsp, cr2, cr3), (cr0, cr4, table, efer), bits, limit)| {
                let mut state = VcpuState::default();
                (state.regs.rip, state.regs.rsp) = (rip, rsp);
                let s = &mut state.sregs;
                (s.cr0, s.cr2, s.cr3, s.cr4, s.efer) = (cr0, cr2, cr3, cr4, efer);
                (s.idt.base, s.idt.limit, s.gdt.base, s.gdt.limit) = (table, limit, table, limit);
                (s.cs.base, s.ss.base) = (rsp, rip);
                (s.cs.l, s.cs.db, s.ss.dpl) = (bits[0] & 1, bits[1] & 1, bits[2] & 3);
                state
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn any_state_and_memory_give_a_bounded_report_and_a_core(
        state in hostile_state(),
        contents in prop::collection::vec(any::<u8>(), 8192),
    ) {
        let mem = Memory::from_ranges(&[(GuestAddress(0), 64 << 10)]).expect("anonymous memory");
        for start in (0..64 << 10).step_by(8192) {
            mem.write_slice(&contents, GuestAddress(start)).expect("in range");
        }
        let report = crash_report("any", &[state], &mem, None);
        prop_assert!(report.len() < 64 << 10);
        prop_assert!(report.chars().all(|c| c == '\n' || c == ' ' || c.is_ascii_graphic()));
    }

    #[test]
    fn tables_that_refer_to_themselves_end(entries in prop::collection::vec(0..16_u64, 512)) {
        let mem = Memory::from_ranges(&[(GuestAddress(0), 64 << 10)]).expect("anonymous memory");
        for table in 0..16_u64 {
            for (slot, target) in (0_u64..).zip(&entries) {
                let entry = (target ^ table) << 12 | 3;
                mem.write_obj(entry, GuestAddress(table * 4096 + slot * 8)).expect("in range");
            }
        }
        let (_, mut state) = machine();
        state.sregs.cr3 = 0;
        let file = tempfile::tempfile().expect("temporary file");
        core::write(&file, &[state], &mem).expect("space");
        prop_assert!(file.metadata().expect("open file").len() < 1 << 20);
    }
}
