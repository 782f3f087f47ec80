//! Names that policies may use for numbers: ioctl requests, flags, io_uring operations.

/// ioctl request codes by name. KVM's are those of `linux/kvm.h`.
pub const REQUESTS: &[(&str, u32)] = &[
    ("KVM_GET_API_VERSION", 0x0000_ae00),
    ("KVM_CREATE_VM", 0x0000_ae01),
    ("KVM_GET_MSR_INDEX_LIST", 0xc004_ae02),
    ("KVM_CHECK_EXTENSION", 0x0000_ae03),
    ("KVM_GET_VCPU_MMAP_SIZE", 0x0000_ae04),
    ("KVM_GET_SUPPORTED_CPUID", 0xc008_ae05),
    ("KVM_GET_EMULATED_CPUID", 0xc008_ae09),
    ("KVM_GET_MSR_FEATURE_INDEX_LIST", 0xc004_ae0a),
    ("KVM_SET_MEMORY_REGION", 0x4018_ae40),
    ("KVM_CREATE_VCPU", 0x0000_ae41),
    ("KVM_GET_DIRTY_LOG", 0x4010_ae42),
    ("KVM_SET_MEMORY_ALIAS", 0x4020_ae43),
    ("KVM_SET_NR_MMU_PAGES", 0x0000_ae44),
    ("KVM_GET_NR_MMU_PAGES", 0x0000_ae45),
    ("KVM_SET_USER_MEMORY_REGION", 0x4020_ae46),
    ("KVM_SET_TSS_ADDR", 0x0000_ae47),
    ("KVM_SET_IDENTITY_MAP_ADDR", 0x4008_ae48),
    ("KVM_CREATE_IRQCHIP", 0x0000_ae60),
    ("KVM_IRQ_LINE", 0x4008_ae61),
    ("KVM_GET_IRQCHIP", 0xc208_ae62),
    ("KVM_SET_IRQCHIP", 0x8208_ae63),
    ("KVM_CREATE_PIT", 0x0000_ae64),
    ("KVM_GET_PIT", 0xc048_ae65),
    ("KVM_SET_PIT", 0x8048_ae66),
    ("KVM_IRQ_LINE_STATUS", 0xc008_ae67),
    ("KVM_SET_GSI_ROUTING", 0x4008_ae6a),
    ("KVM_REINJECT_CONTROL", 0x0000_ae71),
    ("KVM_IRQFD", 0x4020_ae76),
    ("KVM_CREATE_PIT2", 0x4040_ae77),
    ("KVM_SET_BOOT_CPU_ID", 0x0000_ae78),
    ("KVM_IOEVENTFD", 0x4040_ae79),
    ("KVM_SET_CLOCK", 0x4030_ae7b),
    ("KVM_GET_CLOCK", 0x8030_ae7c),
    ("KVM_GET_PIT2", 0x8070_ae9f),
    ("KVM_SET_PIT2", 0x4070_aea0),
    ("KVM_SET_TSC_KHZ", 0x0000_aea2),
    ("KVM_GET_TSC_KHZ", 0x0000_aea3),
    ("KVM_SIGNAL_MSI", 0x4020_aea5),
    ("KVM_SET_PMU_EVENT_FILTER", 0x4020_aeb2),
    ("KVM_CREATE_DEVICE", 0xc00c_aee0),
    ("KVM_SET_DEVICE_ATTR", 0x4018_aee1),
    ("KVM_GET_DEVICE_ATTR", 0x4018_aee2),
    ("KVM_HAS_DEVICE_ATTR", 0x4018_aee3),
    ("KVM_RUN", 0x0000_ae80),
    ("KVM_GET_REGS", 0x8090_ae81),
    ("KVM_SET_REGS", 0x4090_ae82),
    ("KVM_GET_SREGS", 0x8138_ae83),
    ("KVM_SET_SREGS", 0x4138_ae84),
    ("KVM_TRANSLATE", 0xc018_ae85),
    ("KVM_INTERRUPT", 0x4004_ae86),
    ("KVM_GET_MSRS", 0xc008_ae88),
    ("KVM_SET_MSRS", 0x4008_ae89),
    ("KVM_SET_CPUID", 0x4008_ae8a),
    ("KVM_SET_SIGNAL_MASK", 0x4004_ae8b),
    ("KVM_GET_FPU", 0x81a0_ae8c),
    ("KVM_SET_FPU", 0x41a0_ae8d),
    ("KVM_GET_LAPIC", 0x8400_ae8e),
    ("KVM_SET_LAPIC", 0x4400_ae8f),
    ("KVM_SET_CPUID2", 0x4008_ae90),
    ("KVM_GET_CPUID2", 0xc008_ae91),
    ("KVM_TPR_ACCESS_REPORTING", 0xc028_ae92),
    ("KVM_SET_VAPIC_ADDR", 0x4008_ae93),
    ("KVM_GET_MP_STATE", 0x8004_ae98),
    ("KVM_SET_MP_STATE", 0x4004_ae99),
    ("KVM_NMI", 0x0000_ae9a),
    ("KVM_SET_GUEST_DEBUG", 0x4048_ae9b),
    ("KVM_X86_SET_MCE", 0x4040_ae9e),
    ("KVM_GET_VCPU_EVENTS", 0x8040_ae9f),
    ("KVM_SET_VCPU_EVENTS", 0x4040_aea0),
    ("KVM_GET_DEBUGREGS", 0x8080_aea1),
    ("KVM_SET_DEBUGREGS", 0x4080_aea2),
    ("KVM_ENABLE_CAP", 0x4068_aea3),
    ("KVM_GET_XSAVE", 0x9000_aea4),
    ("KVM_SET_XSAVE", 0x5000_aea5),
    ("KVM_GET_XCRS", 0x8188_aea6),
    ("KVM_SET_XCRS", 0x4188_aea7),
    ("KVM_DIRTY_TLB", 0x4010_aeaa),
    ("KVM_KVMCLOCK_CTRL", 0x0000_aead),
    ("KVM_SMI", 0x0000_aeb7),
    ("KVM_GET_NESTED_STATE", 0xc080_aebe),
    ("KVM_SET_NESTED_STATE", 0x4080_aebf),
    ("KVM_CLEAR_DIRTY_LOG", 0xc018_aec0),
    ("KVM_GET_SUPPORTED_HV_CPUID", 0xc008_aec1),
    ("KVM_X86_SET_MSR_FILTER", 0x4188_aec6),
    ("KVM_RESET_DIRTY_RINGS", 0x0000_aec7),
    ("KVM_GET_SREGS2", 0x8140_aecc),
    ("KVM_SET_SREGS2", 0x4140_aecd),
    ("KVM_GET_XSAVE2", 0x9000_aecf),
    ("BLKGETSIZE64", 0x8008_1272),
    ("BLKDISCARD", 0x0000_1277),
    ("BLKZEROOUT", 0x0000_127f),
    ("BLKSSZGET", 0x0000_1268),
    ("BLKPBSZGET", 0x0000_127b),
    ("FIONREAD", 0x0000_541b),
];

/// Other numbers by name.
pub const FLAGS: &[(&str, u32)] = &[
    ("PROT_READ", 1),
    ("PROT_WRITE", 2),
    ("PROT_EXEC", 4),
    ("MAP_SHARED", 1),
    ("MAP_PRIVATE", 2),
    ("MADV_NORMAL", 0),
    ("MADV_DONTNEED", 4),
    ("MADV_FREE", 8),
    ("MADV_DONTFORK", 10),
    ("MADV_MERGEABLE", 12),
    ("MADV_HUGEPAGE", 14),
    ("MADV_NOHUGEPAGE", 15),
    ("MADV_DONTDUMP", 16),
    ("MADV_POPULATE_WRITE", 23),
    ("MADV_COLLAPSE", 25),
    ("F_DUPFD", 0),
    ("F_GETFD", 1),
    ("F_SETFD", 2),
    ("F_GETFL", 3),
    ("F_SETFL", 4),
    ("F_DUPFD_CLOEXEC", 1030),
    ("EPOLL_CTL_ADD", 1),
    ("EPOLL_CTL_DEL", 2),
    ("F_GET_SEALS", 1034),
    ("FUTEX_WAIT_PRIVATE", 128),
    ("FUTEX_WAKE_PRIVATE", 129),
    ("FUTEX_WAIT_BITSET_PRIVATE", 137),
    ("PR_SET_NAME", 15),
    ("PR_SET_DUMPABLE", 4),
    ("PR_SET_NO_NEW_PRIVS", 38),
    ("PR_SET_VMA", 0x5356_4d41),
    ("PR_SET_TIMERSLACK", 29),
    ("SECCOMP_SET_MODE_FILTER", 1),
    ("FALLOC_FL_KEEP_SIZE", 1),
    ("RLIMIT_FSIZE", 1),
    ("SIGSYS", 31),
    ("SIGUSR1", 10),
    ("SIGUSR2", 12),
];

/// io_uring operations by name, without `IORING_OP_`.
pub const OPCODES: &[(&str, u8)] = &[
    ("NOP", 0),
    ("READV", 1),
    ("WRITEV", 2),
    ("FSYNC", 3),
    ("READ_FIXED", 4),
    ("WRITE_FIXED", 5),
    ("POLL_ADD", 6),
    ("POLL_REMOVE", 7),
    ("SYNC_FILE_RANGE", 8),
    ("SENDMSG", 9),
    ("RECVMSG", 10),
    ("TIMEOUT", 11),
    ("TIMEOUT_REMOVE", 12),
    ("ACCEPT", 13),
    ("ASYNC_CANCEL", 14),
    ("LINK_TIMEOUT", 15),
    ("CONNECT", 16),
    ("FALLOCATE", 17),
    ("OPENAT", 18),
    ("CLOSE", 19),
    ("FILES_UPDATE", 20),
    ("STATX", 21),
    ("READ", 22),
    ("WRITE", 23),
    ("FADVISE", 24),
    ("MADVISE", 25),
    ("SEND", 26),
    ("RECV", 27),
    ("OPENAT2", 28),
    ("EPOLL_CTL", 29),
    ("SPLICE", 30),
    ("PROVIDE_BUFFERS", 31),
    ("REMOVE_BUFFERS", 32),
    ("TEE", 33),
    ("SHUTDOWN", 34),
    ("RENAMEAT", 35),
    ("UNLINKAT", 36),
    ("MKDIRAT", 37),
    ("SYMLINKAT", 38),
    ("LINKAT", 39),
    ("MSG_RING", 40),
    ("FSETXATTR", 41),
    ("SETXATTR", 42),
    ("FGETXATTR", 43),
    ("GETXATTR", 44),
    ("SOCKET", 45),
    ("URING_CMD", 46),
    ("SEND_ZC", 47),
    ("SENDMSG_ZC", 48),
    ("READ_MULTISHOT", 49),
    ("WAITID", 50),
    ("FUTEX_WAIT", 51),
    ("FUTEX_WAKE", 52),
    ("FUTEX_WAITV", 53),
    ("FIXED_FD_INSTALL", 54),
    ("FTRUNCATE", 55),
    ("BIND", 56),
    ("LISTEN", 57),
    ("RECV_ZC", 58),
    ("EPOLL_WAIT", 59),
    ("READV_FIXED", 60),
    ("WRITEV_FIXED", 61),
    ("PIPE", 62),
];

fn look_up<T: Copy>(table: &[(&str, T)], name: &str) -> Option<T> {
    table
        .iter()
        .find(|(known, _)| *known == name)
        .map(|&(_, value)| value)
}

/// The ioctl request code `name`.
#[must_use]
pub fn request(name: &str) -> Option<u32> {
    look_up(REQUESTS, name)
}

/// The flag `name`.
#[must_use]
pub fn flag(name: &str) -> Option<u32> {
    look_up(FLAGS, name)
}

/// The io_uring operation `name`.
#[must_use]
pub fn opcode(name: &str) -> Option<u8> {
    look_up(OPCODES, name)
}

/// The name of ioctl request `code`.
#[must_use]
pub fn request_name(code: u32) -> Option<&'static str> {
    REQUESTS
        .iter()
        .find(|&&(_, known)| known == code)
        .map(|&(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_mean_what_the_kernel_means() {
        assert_eq!(request("KVM_RUN"), Some(0xae80));
        assert_eq!(request_name(0xae80), Some("KVM_RUN"));
        assert_eq!(
            flag("PROT_EXEC").map(i64::from),
            Some(i64::from(libc::PROT_EXEC))
        );
        assert_eq!(
            flag("F_SETFL").map(i64::from),
            Some(i64::from(libc::F_SETFL))
        );
        assert_eq!(opcode("READV"), Some(1));
        assert_eq!(opcode("SOCKET"), Some(45));
        assert_eq!(request("KVM_MAKE_COFFEE"), None);
    }
}
