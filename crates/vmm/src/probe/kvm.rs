//! Does KVM on this host truly run a guest?
//!
//! Opening `/dev/kvm` proves nothing: some hosts offer a KVM that interprets the guest's kernel mode and lacks
//! instructions that every kernel uses. So a guest of a few hundred bytes runs them, on the QEMU and KVM that
//! real machines would get, and says how far it came:
//!
//! ```text
//! 32-bit entry ─ L long mode ─ p popcnt ─ x cmpxchg16b ─ f fwait ─ r xrstor64 ─ c clac ─ i int3
//!              ─ s SYSCALL arrives in kernel mode ─ l a loop at hardware speed ─ exit 85
//! ```
#![allow(unsafe_code)]

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use tokio::io::AsyncReadExt;

/// What the guest's last output makes QEMU exit with: `(0x2a << 1) | 1`.
const SUCCESS: i32 = 85;
/// An idle host needs 0.1 s; a busy one gets its time; an interpreter does not finish its loop in it.
const DEADLINE: Duration = Duration::from_secs(6);
const LOAD_ADDRESS: u32 = 0x10_0000;
const OUTPUT_LIMIT: usize = 4096;

/// The steps of the guest by the letter that it writes when a step is done.
const STEPS: [(u8, &str); 9] = [
    (b'L', "long mode"),
    (b'p', "popcnt"),
    (b'x', "cmpxchg16b"),
    (b'f', "fwait"),
    (b'r', "xrstor64"),
    (b'c', "clac"),
    (b'i', "int3"),
    (b's', "syscall into kernel mode"),
    (b'l', "a loop at the speed of hardware"),
];

/// Whether the device is there and may be opened, which is necessary and proves nothing.
pub(crate) fn kvm_opens() -> Result<(), String> {
    match std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Ok(()),
        Err(error) => Err(match error.kind() {
            std::io::ErrorKind::NotFound => {
                "/dev/kvm does not exist: enable virtualisation in the firmware or, \
                 in a virtual machine, nested virtualisation"
                    .to_owned()
            }
            std::io::ErrorKind::PermissionDenied => {
                "/dev/kvm may not be opened: add this user to the group kvm".to_owned()
            }
            _ => format!("/dev/kvm cannot be opened: {error}"),
        }),
    }
}

/// Runs the guest. `Err` carries the reason in words for an operator.
pub(crate) async fn kvm_runs_a_guest(qemu: &Path) -> Result<(), String> {
    if !cfg!(target_arch = "x86_64") {
        return Err("this driver runs x86-64 guests only".to_owned());
    }
    kvm_opens()?;
    run_guest(qemu, "kvm", DEADLINE).await
}

async fn run_guest(qemu: &Path, accelerator: &str, deadline: Duration) -> Result<(), String> {
    let image = write_image().map_err(|error| format!("cannot write the test guest: {error}"))?;
    let mut command = Command::new(qemu);
    command
        .args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
            "-m",
            "32",
        ])
        .args([
            "-machine",
            "q35,sata=off,smbus=off,usb=off",
            "-accel",
            accelerator,
        ])
        .args(["-cpu", if accelerator == "kvm" { "host" } else { "max" }])
        .args([
            "-chardev",
            "stdio,id=out,signal=off",
            "-device",
            "isa-debugcon,iobase=0xe9,chardev=out",
        ])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-kernel"])
        .arg(image.path())
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = tokio::process::Command::from(command)
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("cannot start {}: {error}", qemu.display()))?;
    let (Some(mut output), Some(mut errors)) = (child.stdout.take(), child.stderr.take()) else {
        return Err("the test guest has no output".to_owned());
    };
    let mut progress = Vec::new();
    let mut complaint = Vec::new();
    let finished = tokio::time::timeout(deadline, async {
        let (mut buffer, mut error_buffer) = ([0; 64], [0; 512]);
        let (mut output_open, mut errors_open) = (true, true);
        while output_open || errors_open {
            tokio::select! {
                read = output.read(&mut buffer), if output_open => match read {
                    Ok(0) | Err(_) => output_open = false,
                    Ok(count) => extend(&mut progress, &buffer[..count]),
                },
                read = errors.read(&mut error_buffer), if errors_open => match read {
                    Ok(0) | Err(_) => errors_open = false,
                    Ok(count) => {
                        extend(&mut complaint, &error_buffer[..count]);
                        // QEMU then keeps the dead guest for a debugger instead of exiting.
                        if contains(&complaint, b"internal error") || contains(&complaint, b"error: kvm") {
                            return None;
                        }
                    }
                },
            }
        }
        child.wait().await.ok()
    })
    .await;
    if matches!(&finished, Ok(Some(status)) if status.code() == Some(SUCCESS)) {
        return Ok(());
    }
    let _ = child.start_kill();
    let _ = child.wait().await;
    let stuck = STEPS.iter().find(|(letter, _)| !progress.contains(letter));
    let step = stuck.map_or("the end", |(_, name)| name);
    let complaint = String::from_utf8_lossy(&complaint);
    let complaint = complaint.lines().next().unwrap_or("").trim();
    let end = match finished {
        Err(_) => "did not finish in time".to_owned(),
        Ok(_) if complaint.is_empty() => "died".to_owned(),
        Ok(_) => format!("died ({complaint})"),
    };
    Err(format!("a test guest {end} before {step}"))
}

fn extend(collected: &mut Vec<u8>, bytes: &[u8]) {
    let room = OUTPUT_LIMIT.saturating_sub(collected.len());
    collected.extend_from_slice(&bytes[..bytes.len().min(room)]);
}

fn contains(text: &[u8], word: &[u8]) -> bool {
    text.windows(word.len()).any(|window| window == word)
}

/// The guest as a file that QEMU boots: an ELF program with the note that names its 32-bit entry (PVH).
fn write_image() -> std::io::Result<TemporaryImage> {
    let mut random = [0_u8; 8];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut random)?;
    let name = format!("hypeman-kvm-probe-{:016x}", u64::from_le_bytes(random));
    let path = std::env::temp_dir().join(name);
    let mut file = std::fs::File::options()
        .write(true)
        .create_new(true)
        .open(&path)?;
    let image = TemporaryImage(path);
    file.write_all(&elf(guest_code()))?;
    Ok(image)
}

struct TemporaryImage(std::path::PathBuf);

impl TemporaryImage {
    fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TemporaryImage {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn elf(code: &[u8]) -> Vec<u8> {
    const HEADER: u32 = 52;
    const PROGRAM_HEADER: u32 = 32;
    const NOTE: u32 = 20;
    let code_at = 0x1000_u32;
    let note_at = HEADER + 2 * PROGRAM_HEADER;
    let code_length = code.len() as u32;
    let mut image = Vec::new();
    image.extend_from_slice(b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0");
    let halves = |image: &mut Vec<u8>, values: &[u16]| {
        values
            .iter()
            .for_each(|value| image.extend_from_slice(&value.to_le_bytes()));
    };
    let words = |image: &mut Vec<u8>, values: &[u32]| {
        values
            .iter()
            .for_each(|value| image.extend_from_slice(&value.to_le_bytes()));
    };
    halves(&mut image, &[2, 3]);
    words(&mut image, &[1, LOAD_ADDRESS, HEADER, 0, 0]);
    halves(&mut image, &[HEADER as u16, PROGRAM_HEADER as u16, 2, 0, 0, 0]);
    words(
        &mut image,
        &[
            1,
            code_at,
            LOAD_ADDRESS,
            LOAD_ADDRESS,
            code_length,
            code_length,
            7,
            0x1000,
        ],
    );
    words(&mut image, &[4, note_at, 0, 0, NOTE, NOTE, 4, 4]);
    words(&mut image, &[4, 4, 18]);
    image.extend_from_slice(b"Xen\0");
    words(&mut image, &[LOAD_ADDRESS]);
    image.resize(code_at as usize, 0);
    image.extend_from_slice(code);
    image
}

#[cfg(not(target_arch = "x86_64"))]
fn guest_code() -> &'static [u8] {
    &[]
}

#[cfg(target_arch = "x86_64")]
fn guest_code() -> &'static [u8] {
    unsafe extern "C" {
        static hypeman_kvm_probe_start: u8;
        static hypeman_kvm_probe_end: u8;
    }
    // SAFETY: both labels bound one constant in this program's read-only data, which is defined below.
    unsafe {
        let start = &raw const hypeman_kvm_probe_start;
        let end = &raw const hypeman_kvm_probe_end;
        std::slice::from_raw_parts(start, end.offset_from_unsigned(start))
    }
}

// Runs at 1 MiB with paging off. Page tables at 2 MiB, interrupt table at 0x203000, stacks and the XSAVE area
// below 0x300000. Addresses are written as bytes because the assembler takes no differences of labels as
// operands. Whatever goes wrong is a triple fault, which ends QEMU.
#[cfg(target_arch = "x86_64")]
std::arch::global_asm!(
    r#"
    .pushsection .rodata.hypeman_kvm_probe, "a", @progbits
    .globl hypeman_kvm_probe_start
    .globl hypeman_kvm_probe_end
hypeman_kvm_probe_start:
    .code32
    cli
    cld
    mov edi, 0x200000
    xor eax, eax
    mov ecx, 0x10000
    rep stosd
    mov dword ptr [0x200000], 0x201007
    mov dword ptr [0x201000], 0x202007
    mov dword ptr [0x202000], 0x000087
    mov dword ptr [0x202008], 0x200087
    .byte 0x0f, 0x01, 0x15                  // lgdt [.Lgdt_register]
    .long .Lgdt_register - hypeman_kvm_probe_start + 0x100000
    mov eax, cr4
    or eax, 0x620
    mov cr4, eax
    mov eax, 0x200000
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x101
    wrmsr
    mov eax, 0x80000033
    mov cr0, eax
    .byte 0xb8                              // mov eax, .Llong
    .long .Llong - hypeman_kvm_probe_start + 0x100000
    mov esp, 0x280000
    push 0x08
    push eax
    retf

    .code64
.Llong:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov esp, 0x280000
    mov al, 'L'
    out 0xe9, al

    mov eax, 1
    xor ecx, ecx
    cpuid
    mov r8d, ecx
    bt r8d, 23
    jnc 2f
    mov ebx, 0xff
    popcnt ebx, ebx
    cmp ebx, 8
    jne .Lfail
2:  mov al, 'p'
    out 0xe9, al

    bt r8d, 13
    jnc 2f
    mov edi, 0x290000
    xor eax, eax
    xor edx, edx
    mov ebx, 1
    mov ecx, 2
    lock cmpxchg16b [rdi]
    jnz .Lfail
    cmp qword ptr [rdi + 8], 2
    jne .Lfail
2:  mov al, 'x'
    out 0xe9, al

    fninit
    fwait
    mov al, 'f'
    out 0xe9, al

    bt r8d, 26
    jnc 2f
    mov rax, cr4
    or eax, 0x40000
    mov cr4, rax
    xor ecx, ecx
    xor edx, edx
    mov eax, 3
    xsetbv
    mov edi, 0x2a0000
    mov eax, 3
    xsave64 [rdi]
    xrstor64 [rdi]
2:  mov al, 'r'
    out 0xe9, al

    xor eax, eax
    cpuid
    cmp eax, 7
    jb 2f
    mov eax, 7
    xor ecx, ecx
    cpuid
    bt ebx, 20
    jnc 2f
    clac
2:  mov al, 'c'
    out 0xe9, al

    .byte 0xb8                              // mov eax, .Lbreakpoint
    .long .Lbreakpoint - hypeman_kvm_probe_start + 0x100000
    mov edi, 0x203030
    mov word ptr [rdi], ax
    mov word ptr [rdi + 2], 0x08
    mov word ptr [rdi + 4], 0x8e00
    shr eax, 16
    mov word ptr [rdi + 6], ax
    mov word ptr [0x203800], 0xfff
    mov dword ptr [0x203802], 0x203000
    mov edi, 0x203800
    lidt [rdi]
    xor r9d, r9d
    int3
    cmp r9d, 3
    jne .Lfail
    mov al, 'i'
    out 0xe9, al

    mov ecx, 0xc0000081
    xor eax, eax
    mov edx, 0x100008
    wrmsr
    mov ecx, 0xc0000082
    .byte 0xb8                              // mov eax, .Lsyscall
    .long .Lsyscall - hypeman_kvm_probe_start + 0x100000
    xor edx, edx
    wrmsr
    mov ecx, 0xc0000084
    mov eax, 0x200
    xor edx, edx
    wrmsr
    .byte 0xb9                              // mov ecx, .Luser
    .long .Luser - hypeman_kvm_probe_start + 0x100000
    mov r11d, 2
    sysretq
.Luser:
    syscall
    jmp .Luser
.Lsyscall:
    mov ax, cs
    test al, 3
    jnz .Lfail
    mov rax, cr0
    mov al, 's'
    out 0xe9, al

    mov ecx, 30000000
2:  dec ecx
    jnz 2b
    mov al, 'l'
    out 0xe9, al
    mov al, 0x2a
    out 0xf4, al
.Lfail:
    mov al, 1
    out 0xf4, al
2:  hlt
    jmp 2b
.Lbreakpoint:
    mov r9d, 3
    iretq

    .balign 8
.Lgdt:
    .quad 0
    .quad 0x00af9b000000ffff
    .quad 0x00cf93000000ffff
    .quad 0x00cff3000000ffff
    .quad 0x00affb000000ffff
.Lgdt_register:
    .word 39
    .long (.Lgdt - hypeman_kvm_probe_start) + 0x100000
hypeman_kvm_probe_end:
    .popsection
    "#
);

#[cfg(test)]
mod tests {
    use super::*;

    fn qemu() -> Option<&'static Path> {
        let path = Path::new("/usr/bin/qemu-system-x86_64");
        if !path.exists() {
            println!("SKIPPED: no {}", path.display());
        }
        path.exists().then_some(path)
    }

    #[tokio::test]
    async fn the_guest_runs_to_its_end_where_a_processor_is_complete() {
        let Some(qemu) = qemu() else { return };
        run_guest(qemu, "tcg", Duration::from_secs(300)).await.unwrap();
    }

    #[tokio::test]
    async fn a_guest_that_lacks_something_is_told_apart() {
        let Some(qemu) = qemu() else { return };
        let reason = run_guest(qemu, "no-such-accelerator", Duration::from_secs(60))
            .await
            .unwrap_err();
        assert!(reason.contains("before long mode"), "{reason}");
    }

    #[tokio::test]
    async fn this_host_is_judged_without_hanging() {
        let Some(qemu) = qemu() else { return };
        println!("KVM here: {:?}", kvm_runs_a_guest(qemu).await);
    }
}
