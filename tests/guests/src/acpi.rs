//! The few facts that the guest needs of the ACPI tables: the CPUs, the second I/O APIC, and how
//! to power off and reset.

/// Most CPUs that are listed.
pub const CPUS_MAX: usize = 64;

/// A register as a Generic Address Structure names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// At a physical address.
    Memory(u64),
    /// At a port.
    Port(u16),
}

/// What was found.
#[derive(Debug, Clone, Copy)]
pub struct Acpi {
    /// Number of tables with a good checksum.
    pub tables: u32,
    /// Number of tables with a bad checksum or a senseless length.
    pub bad_tables: u32,
    /// FADT SLEEP_CONTROL_REG of a hardware-reduced platform.
    pub sleep_control: Option<Register>,
    /// FADT RESET_REG.
    pub reset: Option<Register>,
    /// FADT RESET_VALUE.
    pub reset_value: u8,
    /// Whether the FADT says that the platform is hardware-reduced.
    pub hardware_reduced: bool,
    /// Number of I/O APICs in the MADT.
    pub ioapics: u32,
    apic_ids: [u8; CPUS_MAX],
    cpus: usize,
}

impl Acpi {
    /// Local APIC ids of the enabled CPUs.
    pub fn apic_ids(&self) -> &[u8] {
        &self.apic_ids[..self.cpus]
    }
}

/// Reads the tables through `memory`, which gives bytes at an address, or nothing.
pub fn parse<'a>(
    rsdp_address: u64,
    memory: impl Fn(u64, usize) -> Option<&'a [u8]>,
) -> Option<Acpi> {
    let rsdp = memory(rsdp_address, 36)?;
    if rsdp.get(..8)? != b"RSD PTR " || sum(rsdp.get(..20)?) != 0 {
        return None;
    }
    let (root, width) = match *rsdp.get(15)? {
        0 => (u64::from(u32_at(rsdp, 16)?), 4),
        _ => (u64_at(rsdp, 24)?, 8),
    };
    let mut acpi = Acpi {
        tables: 0,
        bad_tables: 0,
        sleep_control: None,
        reset: None,
        reset_value: 0,
        hardware_reduced: false,
        ioapics: 0,
        apic_ids: [0; CPUS_MAX],
        cpus: 0,
    };
    for entry in table(root, &memory, &mut acpi)?
        .get(36..)?
        .chunks_exact(width)
    {
        let address = if width == 4 {
            u64::from(u32_at(entry, 0)?)
        } else {
            u64_at(entry, 0)?
        };
        let Some(bytes) = table(address, &memory, &mut acpi) else {
            continue;
        };
        match bytes.get(..4)? {
            b"FACP" => fadt(bytes, &memory, &mut acpi),
            b"APIC" => madt(bytes, &mut acpi),
            _ => {}
        }
    }
    Some(acpi)
}

fn table<'a>(
    address: u64,
    memory: &impl Fn(u64, usize) -> Option<&'a [u8]>,
    acpi: &mut Acpi,
) -> Option<&'a [u8]> {
    let len = u32_at(memory(address, 36)?, 4)? as usize;
    let bytes = if (36..1 << 20).contains(&len) {
        memory(address, len)
    } else {
        None
    };
    match bytes.filter(|bytes| sum(bytes) == 0) {
        Some(bytes) => acpi.tables += 1_u32.min(bytes.len() as u32),
        None => acpi.bad_tables += 1,
    }
    bytes.filter(|bytes| sum(bytes) == 0)
}

fn fadt<'a>(bytes: &[u8], memory: &impl Fn(u64, usize) -> Option<&'a [u8]>, acpi: &mut Acpi) {
    let flags = u32_at(bytes, 112).unwrap_or(0);
    acpi.hardware_reduced = flags & (1 << 20) != 0;
    if flags & (1 << 10) != 0 {
        acpi.reset = register(bytes, 116);
        acpi.reset_value = bytes.get(128).copied().unwrap_or(0);
    }
    acpi.sleep_control = register(bytes, 244);
    let dsdt = match u64_at(bytes, 140) {
        None | Some(0) => u32_at(bytes, 40).map_or(0, u64::from),
        Some(address) => address,
    };
    let _ = table(dsdt, memory, acpi);
}

fn madt(bytes: &[u8], acpi: &mut Acpi) {
    let mut rest = bytes.get(44..).unwrap_or(&[]);
    while let [kind, len, ..] = *rest {
        let Some(entry) = rest
            .get(..usize::from(len))
            .filter(|entry| entry.len() >= 2)
        else {
            return;
        };
        match kind {
            0 if entry.get(4).is_some_and(|flags| flags & 1 != 0) && acpi.cpus < CPUS_MAX => {
                acpi.apic_ids[acpi.cpus] = entry.get(3).copied().unwrap_or(0);
                acpi.cpus += 1;
            }
            1 => acpi.ioapics += 1,
            _ => {}
        }
        rest = rest.get(usize::from(len)..).unwrap_or(&[]);
    }
}

fn register(bytes: &[u8], offset: usize) -> Option<Register> {
    let address = u64_at(bytes, offset + 4)?;
    match *bytes.get(offset)? {
        0 if address != 0 => Some(Register::Memory(address)),
        1 if address != 0 => Some(Register::Port(u16::try_from(address).ok()?)),
        _ => None,
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(
        bytes.get(offset..offset + 4)?.try_into().ok()?,
    ))
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_le_bytes(
        bytes.get(offset..offset + 8)?.try_into().ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_checksum(mut table: Vec<u8>, at: usize) -> Vec<u8> {
        table[at] = 0u8.wrapping_sub(sum(&table));
        table
    }

    fn table_of(signature: &[u8; 4], body: &[u8]) -> Vec<u8> {
        let mut table = vec![0; 36];
        table[..4].copy_from_slice(signature);
        table.extend_from_slice(body);
        let len = u32::try_from(table.len()).unwrap();
        table[4..8].copy_from_slice(&len.to_le_bytes());
        with_checksum(table, 9)
    }

    /// RSDP at 0, XSDT at 0x100, FADT at 0x200, MADT at 0x400, DSDT at 0x500.
    fn image() -> Vec<u8> {
        let mut rsdp = vec![0; 36];
        rsdp[..8].copy_from_slice(b"RSD PTR ");
        rsdp[8] = 0u8.wrapping_sub(sum(b"RSD PTR ").wrapping_add(2));
        rsdp[15] = 2;
        rsdp[24..32].copy_from_slice(&0x100_u64.to_le_bytes());
        let mut fadt = vec![0; 268 - 36];
        fadt[112 - 36..116 - 36].copy_from_slice(&((1_u32 << 20) | (1 << 10)).to_le_bytes());
        fadt[116 - 36] = 1;
        fadt[120 - 36..122 - 36].copy_from_slice(&0x602_u16.to_le_bytes());
        fadt[128 - 36] = 1;
        fadt[140 - 36..142 - 36].copy_from_slice(&0x500_u16.to_le_bytes());
        fadt[244 - 36] = 1;
        fadt[248 - 36..250 - 36].copy_from_slice(&0x600_u16.to_le_bytes());
        let mut madt = vec![0; 8];
        madt.extend_from_slice(&[0, 8, 0, 0, 1, 0, 0, 0, 0, 8, 1, 1, 1, 0, 0, 0]);
        madt.extend_from_slice(&[0, 8, 2, 2, 0, 0, 0, 0, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let root: Vec<u8> = [0x200_u64, 0x400]
            .iter()
            .flat_map(|a| a.to_le_bytes())
            .collect();
        let mut image = vec![0; 0x600];
        for (at, bytes) in [
            (0, rsdp),
            (0x100, table_of(b"XSDT", &root)),
            (0x200, table_of(b"FACP", &fadt)),
            (0x400, table_of(b"APIC", &madt)),
            (0x500, table_of(b"DSDT", &[])),
        ] {
            image[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        image
    }

    fn parse_image(image: &[u8]) -> Option<Acpi> {
        parse(0, |address, len| {
            let start = usize::try_from(address).ok()?;
            image.get(start..start.checked_add(len)?)
        })
    }

    #[test]
    fn power_registers_and_enabled_cpus_are_found() {
        let acpi = parse_image(&image()).unwrap();
        assert_eq!(acpi.sleep_control, Some(Register::Port(0x600)));
        assert_eq!(
            (acpi.reset, acpi.reset_value),
            (Some(Register::Port(0x602)), 1)
        );
        assert_eq!(acpi.apic_ids(), [0, 1]);
        assert_eq!((acpi.tables, acpi.bad_tables, acpi.ioapics), (4, 0, 1));
        assert!(acpi.hardware_reduced);
    }

    #[test]
    fn a_table_with_a_bad_checksum_is_counted_and_not_used() {
        let mut image = image();
        image[0x400 + 40] ^= 1;
        let acpi = parse_image(&image).unwrap();
        assert_eq!((acpi.tables, acpi.bad_tables), (3, 1));
        assert!(acpi.apic_ids().is_empty());
    }

    #[test]
    fn garbage_ends_without_a_panic() {
        let good = image();
        for at in 0..good.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                let _ = parse_image(&bad);
            }
        }
    }
}
