//! A vCPU made of plain values, which records what it is asked.

use kvm_bindings::{
    kvm_debugregs, kvm_guest_debug, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};

use super::ops::{InternalError, OpResult, VcpuOps};

/// One request to KVM, or to the shared page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    GetRegs,
    SetRegs,
    GetSregs,
    SetSregs,
    GetXsave,
    SetXsave,
    GetXcrs,
    GetMsr(u32),
    SetMsr(u32, u64),
    GetEvents,
    SetEvents,
    GetDebugRegs,
    SetDebugRegs,
    SetGuestDebug,
    Apply,
    InternalError,
}

/// The vCPU.
#[derive(Debug, Default)]
pub(crate) struct Recorder {
    pub(crate) calls: Vec<Call>,
    pub(crate) regs: kvm_regs,
    pub(crate) sregs: kvm_sregs,
    pub(crate) xsave: kvm_xsave,
    pub(crate) xcr0: u64,
    pub(crate) msrs: std::collections::BTreeMap<u32, u64>,
    pub(crate) events: kvm_vcpu_events,
    pub(crate) debug_regs: kvm_debugregs,
    pub(crate) guest_debug: kvm_guest_debug,
    pub(crate) error: InternalError,
    pub(crate) expects_sregs: bool,
}

impl VcpuOps for Recorder {
    fn regs(&mut self) -> OpResult<kvm_regs> {
        self.calls.push(Call::GetRegs);
        Ok(self.regs)
    }

    fn set_regs(&mut self, regs: &kvm_regs) {
        self.calls.push(Call::SetRegs);
        self.regs = *regs;
    }

    fn sregs(&mut self) -> OpResult<kvm_sregs> {
        self.calls.push(Call::GetSregs);
        Ok(self.sregs)
    }

    fn set_sregs(&mut self, sregs: &kvm_sregs) {
        self.calls.push(Call::SetSregs);
        self.sregs = *sregs;
    }

    fn xsave(&mut self) -> OpResult<Box<kvm_xsave>> {
        self.calls.push(Call::GetXsave);
        Ok(Box::new(kvm_xsave {
            region: self.xsave.region,
            ..kvm_xsave::default()
        }))
    }

    fn set_xsave(&mut self, image: &kvm_xsave) -> OpResult<()> {
        self.calls.push(Call::SetXsave);
        self.xsave.region = image.region;
        Ok(())
    }

    fn xcrs(&mut self) -> OpResult<kvm_xcrs> {
        self.calls.push(Call::GetXcrs);
        let mut xcrs = kvm_xcrs {
            nr_xcrs: 1,
            ..kvm_xcrs::default()
        };
        xcrs.xcrs[0].value = self.xcr0;
        Ok(xcrs)
    }

    fn msr(&mut self, index: u32) -> OpResult<Option<u64>> {
        self.calls.push(Call::GetMsr(index));
        Ok(Some(self.msrs.get(&index).copied().unwrap_or(0)))
    }

    fn set_msr(&mut self, index: u32, value: u64) -> OpResult<bool> {
        self.calls.push(Call::SetMsr(index, value));
        self.msrs.insert(index, value);
        Ok(true)
    }

    fn events(&mut self) -> OpResult<kvm_vcpu_events> {
        self.calls.push(Call::GetEvents);
        Ok(self.events)
    }

    fn set_events(&mut self, events: &kvm_vcpu_events) {
        self.calls.push(Call::SetEvents);
        self.events = *events;
    }

    fn debug_regs(&mut self) -> OpResult<kvm_debugregs> {
        self.calls.push(Call::GetDebugRegs);
        Ok(self.debug_regs)
    }

    fn set_debug_regs(&mut self, regs: &kvm_debugregs) -> OpResult<()> {
        self.calls.push(Call::SetDebugRegs);
        self.debug_regs = *regs;
        Ok(())
    }

    fn set_guest_debug(&mut self, debug: &kvm_guest_debug) -> OpResult<()> {
        self.calls.push(Call::SetGuestDebug);
        self.guest_debug = *debug;
        Ok(())
    }

    fn apply(&mut self) -> OpResult<()> {
        self.calls.push(Call::Apply);
        Ok(())
    }

    fn expect(&mut self, sregs: bool) {
        self.expects_sregs = sregs;
    }

    fn internal_error(&mut self) -> InternalError {
        self.calls.push(Call::InternalError);
        self.error
    }
}
