//! The DSDT: every device that a kernel cannot find by probing.

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Arg, Device, EISAName, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule,
    FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify, OpRegion,
    OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store,
};
use acpi_tables::sdt::Sdt;
use bulkhead_ipc::platform;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, bytes_of};

/// A table header without a body.
const HEADER_BYTES: u32 = 36;
/// Revision 2 gives AML 64-bit integers.
const REVISION: u8 = 2;
/// `_STA`: present, enabled, shown, working.
const STATUS_WORKING: u8 = 0xf;
/// Notification of a power button: pressed.
const BUTTON_PRESSED: u8 = 0x80;
/// Bit of the event register that says so.
const EVENT_POWER_BUTTON: u8 = 1;

/// The whole table for a machine with devices in `slots`.
pub(super) fn build(slots: &[u8]) -> Vec<u8> {
    let mut devices = vec![
        serial(),
        clock(),
        panic_port(),
        power_button(),
        event_device(),
    ];
    devices.extend(slots.iter().map(|slot| virtio(*slot)));
    let devices: Vec<Raw> = devices.into_iter().map(Raw).collect();
    let mut body = bytes_of(&Scope::new(
        "\\_SB_".into(),
        devices.iter().map(|device| device as &dyn Aml).collect(),
    ));
    body.extend(soft_off());
    let mut table = Sdt::new(
        *b"DSDT",
        HEADER_BYTES,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    table.append_slice(&body);
    table.as_slice().to_vec()
}

/// AML that is encoded already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn serial() -> Vec<u8> {
    let irq = irq(platform::COM1_GSI);
    let ports = IO::new(platform::COM1_PORT, platform::COM1_PORT, 1, 8);
    device("COM1", &EISAName::new("PNP0501"), 0, &[&ports, &irq], &[])
}

fn clock() -> Vec<u8> {
    let irq = irq(platform::RTC_GSI);
    let ports = IO::new(platform::RTC_PORT, platform::RTC_PORT, 1, 2);
    device("RTC0", &EISAName::new("PNP0B00"), 0, &[&ports, &irq], &[])
}

fn panic_port() -> Vec<u8> {
    let ports = IO::new(platform::PVPANIC_PORT, platform::PVPANIC_PORT, 1, 1);
    device("PEVT", &"QEMU0001", 0, &[&ports], &[])
}

fn virtio(slot: u8) -> Vec<u8> {
    let (Some(gsi), Ok(address)) = (
        platform::VIRTIO_MMIO_GSI.get(usize::from(slot)).copied(),
        u32::try_from(platform::virtio_mmio_address(slot)),
    ) else {
        return Vec::new(); // Slots are checked before; one that no machine has is no device.
    };
    let registers = Memory32Fixed::new(true, address, REGISTER_BYTES);
    let irq = irq(gsi);
    let name = format!("VR{slot:02X}");
    device(&name, &"LNRO0005", slot.into(), &[&registers, &irq], &[])
}

#[expect(clippy::cast_possible_truncation, reason = "one page")]
const REGISTER_BYTES: u32 = platform::VIRTIO_MMIO_STRIDE as u32;

fn power_button() -> Vec<u8> {
    device("PWRB", &EISAName::new("PNP0C0C"), 0, &[], &[])
}

/// The generic event device: its interrupt makes the kernel run `_EVT`, which reads (and so clears)
/// the event register and tells the power button's driver.
fn event_device() -> Vec<u8> {
    let irq = irq(platform::ACPI_GED_GSI);
    let offset = platform::ACPI_GED_PORT;
    let region = OpRegion::new("EREG".into(), OpRegionSpace::SystemIO, &offset, &1u8);
    let field = Field::new(
        "EREG".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"ESEL", 8)],
    );
    let (events, register, button) = (Local(0), Path::new("ESEL"), Path::new("\\_SB_.PWRB"));
    let read = Store::new(&events, &register);
    let target = Local(1);
    let select = And::new(&target, &events, &EVENT_POWER_BUTTON);
    let pressed = Equal::new(&target, &EVENT_POWER_BUTTON);
    let notify = Notify::new(&button, &BUTTON_PRESSED);
    let react = If::new(&pressed, vec![&notify]);
    let gsi = u8::try_from(platform::ACPI_GED_GSI).unwrap_or(u8::MAX);
    let (argument, expected) = (Arg(0), gsi);
    let ours = Equal::new(&argument, &expected);
    let guarded = If::new(&ours, vec![&read, &select, &react]);
    let event = Method::new("_EVT".into(), 1, true, vec![&guarded]);
    device("GED_", &"ACPI0013", 0, &[&irq], &[&region, &field, &event])
}

/// `\_S5`, the sleep type that turns the machine off.
fn soft_off() -> Vec<u8> {
    let kind = platform::ACPI_S5_SLEEP_TYPE;
    bytes_of(&Name::new(
        "\\_S5_".into(),
        &Package::new(vec![&kind, &0u8, &0u8, &0u8]),
    ))
}

fn irq(gsi: u32) -> Interrupt {
    let (consumer, edge, active_low, shared) = (true, true, false, false);
    Interrupt::new(consumer, edge, active_low, shared, gsi)
}

/// A device with the usual names; without resources it has no `_CRS`.
fn device(
    name: &str,
    id: &dyn Aml,
    uid: usize,
    resources: &[&dyn Aml],
    more: &[&dyn Aml],
) -> Vec<u8> {
    let hid = Name::new("_HID".into(), id);
    let uid = Name::new("_UID".into(), &uid);
    let status = Name::new("_STA".into(), &STATUS_WORKING);
    let mut children: Vec<&dyn Aml> = vec![&hid, &uid, &status];
    let template = Name::new("_CRS".into(), &ResourceTemplate::new(resources.to_vec()));
    if !resources.is_empty() {
        children.push(&template);
    }
    children.extend(more);
    bytes_of(&Device::new(name.into(), children))
}
