//! What the broker is told of a guest that crashed: a report in pieces, and a core in the file that
//! the process was born with, if it was.
//!
//! Works on the control thread when every vCPU has stopped. Reading symbols or writing a core may
//! fail; the report then says so and the outcome is told all the same.

use std::fs::File;

use bulkhead_ipc::protocol::TEXT_BYTES_MAX;
use bulkhead_ipc::protocol::vcpu::{FromVcpu, Outcome};
use vm_memory::GuestMemoryMmap;

use crate::boot::{LoadedKernel, SymbolSource};
use crate::group::Ending;
use crate::report::{self, Symbols, VcpuState};

/// Everything that a report is made from, besides the vCPUs.
#[derive(Debug)]
pub struct CrashScene {
    memory: GuestMemoryMmap,
    symbols: Option<Symbols>,
    core: Option<File>,
}

/// Whether an outcome calls for a report.
#[must_use]
pub fn is_crash(outcome: Outcome) -> bool {
    reason(outcome).is_some()
}

fn reason(outcome: Outcome) -> Option<&'static str> {
    match outcome {
        Outcome::TripleFault => Some("triple fault"),
        Outcome::GuestPanic => Some("the guest's kernel panicked"),
        Outcome::InternalError => Some("KVM cannot run the guest"),
        Outcome::PowerOff | Outcome::Reset | Outcome::DebugExit(_) | Outcome::Killed => None,
    }
}

impl CrashScene {
    /// Keeps the kernel file only if it has symbols.
    #[must_use]
    pub fn new(
        memory: GuestMemoryMmap,
        loaded: LoadedKernel,
        kernel: File,
        core: Option<File>,
    ) -> Self {
        let symbols = match loaded.symbols {
            SymbolSource::KernelFile => Some(Symbols::new(kernel)),
            SymbolSource::None => None,
        };
        Self {
            memory,
            symbols,
            core,
        }
    }

    /// Tells of a crash; of any other end nothing.
    pub fn tell(&self, ending: &Ending, vcpus: &[VcpuState], say: &mut dyn FnMut(FromVcpu)) {
        let Some(reason) = reason(ending.outcome) else {
            return;
        };
        let detail = match ending.detail.as_str() {
            "" => String::new(),
            detail => format!(": {detail}"),
        };
        let reason = format!("{reason} on vCPU {}{detail}", ending.vcpu);
        let text = report::crash_report(&reason, vcpus, &self.memory, self.symbols.as_ref());
        for piece in pieces(&text) {
            say(FromVcpu::Report {
                text: piece.to_owned(),
            });
        }
        if let Some(file) = &self.core {
            let text = match report::core::write(file, vcpus, &self.memory) {
                Ok(()) => "the core file is complete\n".to_owned(),
                Err(error) => format!("no core was written: {error}\n"),
            };
            say(FromVcpu::Report { text });
        }
    }
}

/// Cuts a text into pieces that fit a message, between lines where possible.
fn pieces(mut text: &str) -> Vec<&str> {
    let mut pieces = Vec::new();
    while !text.is_empty() {
        let most = text.floor_char_boundary(TEXT_BYTES_MAX);
        let cut = match text.split_at(most) {
            (_, "") => most,
            (head, _) => head.rfind('\n').map_or(most, |newline| newline + 1),
        };
        let (piece, rest) = text.split_at(cut);
        pieces.push(piece);
        text = rest;
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn long_report_is_cut_between_lines() {
        let line = format!("{}\n", "é".repeat(1000));
        let text = line.repeat(100);
        let pieces = pieces(&text);
        assert!(pieces.len() > 1);
        assert!(pieces.iter().all(|piece| piece.ends_with('\n')));
        assert_eq!(pieces.concat(), text);
    }

    proptest! {
        #[test]
        fn pieces_fit_and_are_the_text(text in "(?s).{0,300}", times in 1usize..600) {
            let text = text.repeat(times);
            let pieces = pieces(&text);
            for piece in &pieces {
                prop_assert!(!piece.is_empty() && piece.len() <= TEXT_BYTES_MAX);
            }
            prop_assert_eq!(pieces.concat(), text);
        }
    }
}
