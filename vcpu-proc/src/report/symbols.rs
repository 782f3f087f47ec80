//! The kernel's symbols, read from its ELF file when the first crash asks for one.

use std::cell::OnceCell;
use std::fs::File;

use object::read::elf::ElfFile64;
use object::{Object as _, ObjectSymbol as _, ReadCache, SymbolKind};

/// Symbols read at most; the largest kernels have a few hundred thousand.
const SYMBOLS_MAX: usize = 2_000_000;
/// Furthest distance from a symbol at which an address still gets its name.
const DISTANCE_MAX: u64 = 1 << 20;

/// The symbols of a kernel file.
#[derive(Debug)]
pub struct Symbols {
    file: File,
    /// Sorted by address.
    table: OnceCell<Vec<(u64, String)>>,
}

/// Why a file has no symbols to offer.
#[derive(Debug, thiserror::Error)]
pub enum SymbolError {
    /// It is not a 64-bit little-endian ELF file, or a broken one.
    #[error("kernel symbols: {0}")]
    Elf(#[from] object::Error),
}

impl Symbols {
    /// Keeps `file` for later. Nothing is read yet.
    #[must_use]
    pub fn new(file: File) -> Self {
        Self {
            file,
            table: OnceCell::new(),
        }
    }

    /// Number of symbols in the file.
    ///
    /// # Errors
    /// If it cannot be read as an ELF file.
    pub fn count(&self) -> Result<usize, SymbolError> {
        if let Some(table) = self.table.get() {
            return Ok(table.len());
        }
        let table = read(&self.file)?;
        Ok(self.table.get_or_init(|| table).len())
    }

    /// The symbol at or before an address, and the distance to it.
    #[must_use]
    pub fn lookup(&self, address: u64) -> Option<(String, u64)> {
        let table = self.table.get_or_init(|| {
            // A locked process cannot duplicate descriptors, so the file itself is read.
            read(&self.file).unwrap_or_default()
        });
        let after = table.partition_point(|(start, _)| *start <= address);
        let (start, name) = table.get(after.checked_sub(1)?)?;
        let offset = address - start;
        (offset < DISTANCE_MAX).then(|| (format!("{:#}", rustc_demangle::demangle(name)), offset))
    }
}

fn read(file: &File) -> Result<Vec<(u64, String)>, SymbolError> {
    let cache = ReadCache::new(file);
    let elf: ElfFile64<'_, object::LittleEndian, _> = ElfFile64::parse(&cache)?;
    let mut table: Vec<(u64, String)> = elf
        .symbols()
        .filter(|symbol| symbol.is_definition() && symbol.address() != 0)
        .filter(|symbol| {
            matches!(
                symbol.kind(),
                SymbolKind::Text | SymbolKind::Data | SymbolKind::Unknown
            )
        })
        .filter_map(|symbol| {
            let name = String::from_utf8_lossy(symbol.name_bytes().ok()?).into_owned();
            (!name.is_empty()).then_some((symbol.address(), name))
        })
        .take(SYMBOLS_MAX)
        .collect();
    table.sort();
    Ok(table)
}
