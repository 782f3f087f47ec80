//! Guests of a few instructions: ELF files with a PVH entry, assembled by hand.

use bulkhead_ipc::platform;

/// What the guest does, after printing `!` on the serial port.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Guest {
    /// Powers off through ACPI.
    PowerOff,
    /// Resets through ACPI.
    Reset,
    /// Writes to the debug exit port.
    DebugExit(u8),
    /// Takes an exception without a handler.
    TripleFault,
    /// Spins for ever.
    Spin,
}

const ENTRY: u32 = 0x10_0000;
const HEADERS: usize = 64 + 2 * 56;
const NOTE: usize = 20;

/// `mov dx, port; mov al, value; out dx, al` in 32-bit code.
fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

impl Guest {
    fn code(self) -> Vec<u8> {
        let mut code = out(platform::COM1_PORT, b'!');
        let sleep = platform::ACPI_S5_SLEEP_TYPE << 2 | 1 << 5;
        code.extend(match self {
            Self::PowerOff => out(platform::ACPI_SLEEP_CONTROL_PORT, sleep),
            Self::Reset => out(platform::ACPI_RESET_PORT, 1),
            Self::DebugExit(value) => out(platform::DEBUG_EXIT_PORT, value),
            // lidt of six zero bytes at the end of the code, then ud2.
            Self::TripleFault => {
                let at = ENTRY + 7 + 9 + 2;
                let mut code = vec![0x0f, 0x01, 0x1d];
                code.extend(at.to_le_bytes());
                code.extend([0x0f, 0x0b]);
                code
            }
            Self::Spin => Vec::new(),
        });
        // jmp self
        code.extend([0xeb, 0xfe]);
        code.extend([0; 6]);
        code
    }

    /// The kernel image.
    pub(crate) fn elf(self) -> Vec<u8> {
        let code = self.code();
        let mut elf = Vec::new();
        elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        elf.extend(2u16.to_le_bytes());
        elf.extend(62u16.to_le_bytes());
        elf.extend(1u32.to_le_bytes());
        elf.extend(u64::from(ENTRY).to_le_bytes());
        elf.extend(64u64.to_le_bytes());
        elf.extend(0u64.to_le_bytes());
        elf.extend(0u32.to_le_bytes());
        for half in [64u16, 56, 2, 64, 0, 0] {
            elf.extend(half.to_le_bytes());
        }
        let mut segment = |kind: u32, flags: u32, offset: usize, address: u32, len: usize| {
            elf.extend(kind.to_le_bytes());
            elf.extend(flags.to_le_bytes());
            elf.extend((offset as u64).to_le_bytes());
            elf.extend(u64::from(address).to_le_bytes());
            elf.extend(u64::from(address).to_le_bytes());
            elf.extend((len as u64).to_le_bytes());
            elf.extend((len as u64).to_le_bytes());
            elf.extend(4u64.to_le_bytes());
        };
        segment(1, 7, HEADERS + NOTE, ENTRY, code.len());
        segment(4, 4, HEADERS, 0, NOTE);
        // The note XEN_ELFNOTE_PHYS32_ENTRY (18) of "Xen".
        for word in [4u32, 4, 18] {
            elf.extend(word.to_le_bytes());
        }
        elf.extend(b"Xen\0");
        elf.extend(ENTRY.to_le_bytes());
        elf.extend(code);
        elf
    }
}
