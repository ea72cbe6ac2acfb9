//! System call filters, beside the VMM's own.
//!
//! The first takes away what no VMM needs and what makes kernels fall: namespaces, mounts, modules, tracing, keys. It
//! matters most where an unprivileged process could make a user namespace and be root in it.
//!
//! The second asks us when a file is opened in one particular way (see [`crate::opener`]), or what is asked of a TAP
//! (see [`crate::tap`]).

use libc::sock_filter;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const LITTLE: bool = cfg!(target_endian = "little");
const FIRST_ARGUMENT: u32 = if LITTLE { 16 } else { 20 };
const SECOND_ARGUMENT: u32 = if LITTLE { 24 } else { 28 };
const THIRD_ARGUMENT: u32 = if LITTLE { 32 } else { 36 };

#[cfg(target_arch = "x86_64")]
const NATIVE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const NATIVE: u32 = 0xc000_00b7;

/// Calls of the 32-bit pointer ABI of x86 have this bit in their number.
#[cfg(target_arch = "x86_64")]
const FOREIGN_ABI: Option<u32> = Some(0x4000_0000);
#[cfg(not(target_arch = "x86_64"))]
const FOREIGN_ABI: Option<u32> = None;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const IF_AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const IF_ANY_BIT: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const REFUSE: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
/// Tells a C library to try an older way.
const UNKNOWN: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

const NAMESPACES: u32 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u32;

/// How VMMs open the device of TAPs.
const TAP_OPEN: u32 = (libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC) as u32;
/// Some libraries always set it, and it changes nothing here.
const LARGE_FILE: u32 = if cfg!(target_arch = "aarch64") {
    0o400_000
} else {
    0o100_000
};
/// The older way to open a file, where there is one.
#[cfg(target_arch = "x86_64")]
const OPEN: Option<libc::c_long> = Some(libc::SYS_open);
#[cfg(not(target_arch = "x86_64"))]
const OPEN: Option<libc::c_long> = None;
/// What VMMs ask of a TAP by its name.
pub(crate) const TAP_ATTACH: u32 = libc::TUNSETIFF as u32;
const TAP_ADDRESS: u32 = libc::SIOCGIFHWADDR as u32;
const TAP_FLAGS: u32 = libc::SIOCGIFFLAGS as u32;
pub(crate) const TAP_MTU: u32 = libc::SIOCGIFMTU as u32;

/// What no VMM needs.
const REFUSED: [libc::c_long; 39] = [
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_reboot,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_open_by_handle_at,
    libc::SYS_syslog,
    libc::SYS_sethostname,
    libc::SYS_personality,
];

const fn instruction(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

/// Refuses what no VMM needs.
pub(crate) fn restrict() -> Vec<sock_filter> {
    let refused: Vec<u32> = REFUSED.iter().map(|number| *number as u32).collect();
    let mut program = vec![
        instruction(LOAD, ARCHITECTURE, 0, 0),
        instruction(IF_EQUAL, NATIVE, 1, 0),
        instruction(RETURN, UNKNOWN, 0, 0),
        instruction(LOAD, NUMBER, 0, 0),
    ];
    if let Some(bit) = FOREIGN_ABI {
        program.push(instruction(IF_AT_LEAST, bit, 0, 1));
        program.push(instruction(RETURN, UNKNOWN, 0, 0));
    }
    for (at, number) in refused.iter().enumerate() {
        // To the last instruction: over the rest of the list and six more.
        let distance = refused.len() - at - 1 + 6;
        program.push(instruction(IF_EQUAL, *number, distance as u8, 0));
    }
    program.extend([
        // Its flags lie in memory, where a filter cannot look.
        instruction(IF_EQUAL, libc::SYS_clone3 as u32, 0, 1),
        instruction(RETURN, UNKNOWN, 0, 0),
        instruction(IF_EQUAL, libc::SYS_clone as u32, 0, 2),
        instruction(LOAD, FIRST_ARGUMENT, 0, 0),
        instruction(IF_ANY_BIT, NAMESPACES, 1, 0),
        instruction(RETURN, ALLOW, 0, 0),
        instruction(RETURN, REFUSE, 0, 0),
    ]);
    program
}

/// Asks us about files that are opened for reading and writing and with no other flag.
pub(crate) fn ask_about_open() -> Vec<sock_filter> {
    vec![
        instruction(LOAD, ARCHITECTURE, 0, 0),
        instruction(IF_EQUAL, NATIVE, 0, 4),
        instruction(LOAD, NUMBER, 0, 0),
        instruction(IF_EQUAL, libc::SYS_openat as u32, 0, 2),
        instruction(LOAD, THIRD_ARGUMENT, 0, 0),
        instruction(IF_EQUAL, libc::O_RDWR as u32, 1, 0),
        instruction(RETURN, ALLOW, 0, 0),
        instruction(RETURN, libc::SECCOMP_RET_USER_NOTIF, 0, 0),
    ]
}

/// Asks us about files that are opened as the device of TAPs is, and about TAPs.
pub(crate) fn ask_about_tap() -> Vec<sock_filter> {
    let questions = [TAP_ATTACH, TAP_ADDRESS, TAP_FLAGS, TAP_MTU];
    let opens = [TAP_OPEN];
    let mut calls: Vec<(libc::c_long, u32, u32, &[u32])> = vec![
        (libc::SYS_ioctl, SECOND_ARGUMENT, u32::MAX, questions.as_slice()),
        (libc::SYS_openat, THIRD_ARGUMENT, !LARGE_FILE, opens.as_slice()),
    ];
    calls.extend(OPEN.map(|number| (number, SECOND_ARGUMENT, !LARGE_FILE, opens.as_slice())));
    let mut program = vec![
        instruction(LOAD, ARCHITECTURE, 0, 0),
        instruction(IF_EQUAL, NATIVE, 1, 0),
        instruction(RETURN, ALLOW, 0, 0),
        instruction(LOAD, NUMBER, 0, 0),
    ];
    for (number, argument, mask, wanted) in calls {
        // Another call: over the comparisons and four more.
        program.push(instruction(IF_EQUAL, number as u32, 0, (wanted.len() + 4) as u8));
        program.push(instruction(LOAD, argument, 0, 0));
        program.push(instruction(AND, mask, 0, 0));
        for (at, value) in wanted.iter().enumerate() {
            program.push(instruction(IF_EQUAL, *value, (wanted.len() - at) as u8, 0));
        }
        program.push(instruction(RETURN, ALLOW, 0, 0));
        program.push(instruction(RETURN, libc::SECCOMP_RET_USER_NOTIF, 0, 0));
    }
    program.push(instruction(RETURN, ALLOW, 0, 0));
    program
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What the kernel would answer.
    fn run(program: &[sock_filter], architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
        let mut data = Vec::new();
        data.extend(number.to_ne_bytes());
        data.extend(architecture.to_ne_bytes());
        data.extend(0_u64.to_ne_bytes());
        data.extend(arguments.iter().flat_map(|argument| argument.to_ne_bytes()));
        let (mut at, mut value) = (0, 0_u32);
        loop {
            let step = program[at];
            let jump = |condition: bool| 1 + usize::from(if condition { step.jt } else { step.jf });
            at += match step.code {
                LOAD => {
                    let offset = step.k as usize;
                    value = u32::from_ne_bytes(data[offset..offset + 4].try_into().unwrap());
                    1
                }
                IF_EQUAL => jump(value == step.k),
                IF_AT_LEAST => jump(value >= step.k),
                IF_ANY_BIT => jump(value & step.k != 0),
                AND => {
                    value &= step.k;
                    1
                }
                RETURN => return step.k,
                other => panic!("{other}"),
            };
        }
    }

    #[test]
    fn what_is_listed_is_refused() {
        let program = restrict();
        for number in REFUSED {
            assert_eq!(run(&program, NATIVE, number as u32, [0; 6]), REFUSE, "{number}");
        }
        assert_eq!(run(&program, NATIVE, libc::SYS_clone3 as u32, [0; 6]), UNKNOWN);
        assert_eq!(run(&program, NATIVE ^ 1, libc::SYS_read as u32, [0; 6]), UNKNOWN);
    }

    #[test]
    fn threads_are_made_and_namespaces_are_not() {
        let clone = |flags: libc::c_int| {
            let arguments = [flags as u64, 0, 0, 0, 0, 0];
            run(&restrict(), NATIVE, libc::SYS_clone as u32, arguments)
        };
        assert_eq!(
            clone(libc::CLONE_VM | libc::CLONE_THREAD | libc::CLONE_SIGHAND),
            ALLOW
        );
        assert_eq!(clone(libc::CLONE_NEWUSER | libc::SIGCHLD), REFUSE);
        assert_eq!(clone(libc::CLONE_NEWNET), REFUSE);
    }

    #[test]
    fn only_one_way_of_opening_is_asked_about() {
        let open = |number: libc::c_long, flags: libc::c_int| {
            let arguments = [0, 0, flags as u64, 0, 0, 0];
            run(&ask_about_open(), NATIVE, number as u32, arguments)
        };
        assert_eq!(open(libc::SYS_openat, libc::O_RDWR), libc::SECCOMP_RET_USER_NOTIF);
        for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR | libc::O_CLOEXEC] {
            assert_eq!(open(libc::SYS_openat, flags), ALLOW);
        }
        assert_eq!(open(libc::SYS_read, libc::O_RDWR), ALLOW);
    }

    #[test]
    fn a_tap_is_asked_about_however_it_is_opened() {
        const ASK: u32 = libc::SECCOMP_RET_USER_NOTIF;
        let call = |number: libc::c_long, arguments: [u64; 6]| {
            run(&ask_about_tap(), NATIVE, number as u32, arguments)
        };
        for flags in [TAP_OPEN, TAP_OPEN | LARGE_FILE].map(u64::from) {
            assert_eq!(call(libc::SYS_openat, [0, 0, flags, 0, 0, 0]), ASK);
            if let Some(open) = OPEN {
                assert_eq!(call(open, [0, flags, 0, 0, 0, 0]), ASK);
                assert_eq!(call(open, [0, 0, flags, 0, 0, 0]), ALLOW);
            }
            let creates = flags | libc::O_CREAT as u64;
            assert_eq!(call(libc::SYS_openat, [0, 0, creates, 0, 0, 0]), ALLOW);
            assert_eq!(call(libc::SYS_read, [0, flags, flags, 0, 0, 0]), ALLOW);
        }
        for asked in [TAP_ATTACH, TAP_ADDRESS, TAP_FLAGS, TAP_MTU] {
            assert_eq!(call(libc::SYS_ioctl, [7, u64::from(asked), 0, 0, 0, 0]), ASK);
            // The kernel looks at no more of it than this.
            let beyond = u64::from(asked) | 1 << 32;
            assert_eq!(call(libc::SYS_ioctl, [7, beyond, 0, 0, 0, 0]), ASK);
        }
        for other in [libc::TUNGETFEATURES as u32, libc::SIOCSIFFLAGS as u32, 0xae80] {
            assert_eq!(call(libc::SYS_ioctl, [7, u64::from(other), 0, 0, 0, 0]), ALLOW);
        }
    }

    proptest! {
        #[test]
        fn everything_else_passes(number in 0_u32..500, arguments in any::<[u64; 6]>()) {
            let special = [libc::SYS_clone, libc::SYS_clone3];
            prop_assume!(!REFUSED.iter().chain(&special).any(|refused| *refused as u32 == number));
            prop_assert_eq!(run(&restrict(), NATIVE, number, arguments), ALLOW);
        }
    }
}
