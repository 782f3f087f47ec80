//! Guest code, written as assembly and taken out of the test's own image.

/// Defines functions that give the machine code of the lines; `hlt` is added.
macro_rules! guest_code {
    ($($name:ident: $($line:literal),+;)+) => { $(
        pub(crate) fn $name() -> &'static [u8] {
            unsafe extern "C" {
                #[link_name = concat!("guest_code_", stringify!($name))]
                static START: u8;
                #[link_name = concat!("guest_code_end_", stringify!($name))]
                static END: u8;
            }
            // SAFETY: both labels are in the section below, START not after END, with initialised
            // read-only bytes between them.
            unsafe {
                let start = &raw const START;
                let end = &raw const END;
                std::slice::from_raw_parts(start, end.addr() - start.addr())
            }
        }
        std::arch::global_asm!(
            ".pushsection .rodata.guest_code,\"a\",@progbits",
            concat!(".globl guest_code_", stringify!($name)),
            concat!(".globl guest_code_end_", stringify!($name)),
            concat!("guest_code_", stringify!($name), ":"),
            $($line,)+
            "hlt",
            concat!("guest_code_end_", stringify!($name), ":"),
            ".popsection",
        );
    )+ };
}
pub(crate) use guest_code;
