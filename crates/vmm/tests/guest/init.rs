//! The guest of the tests: takes orders over the agent's port, one word (and a number) a line.
//! Built by the tests with `rustc`, not part of any crate.

use std::ffi::{CString, c_char, c_int, c_long, c_ulong, c_void};
use std::alloc::{Layout, alloc_zeroed};
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

unsafe extern "C" {
    fn mount(source: *const c_char, target: *const c_char, kind: *const c_char, flags: c_ulong, data: *const c_void) -> c_int;
    fn reboot(command: c_int) -> c_int;
    fn sync();
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn bind(socket: c_int, address: *const VsockAddress, length: u32) -> c_int;
    fn connect(socket: c_int, address: *const VsockAddress, length: u32) -> c_int;
    fn listen(socket: c_int, backlog: c_int) -> c_int;
    fn accept(socket: c_int, address: *mut c_void, length: *mut u32) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
}

#[repr(C)]
struct VsockAddress {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags: u8,
    zero: [u8; 3],
}

const AF_VSOCK: c_int = 40;
const HOST: u32 = 2;
const AGENT_PORT: u32 = 2222;
const LOG_PORT: u32 = 2223;

fn vsock(cid: u32, port: u32, attach: unsafe extern "C" fn(c_int, *const VsockAddress, u32) -> c_int) -> Option<File> {
    let address = VsockAddress { family: AF_VSOCK as u16, reserved: 0, port, cid, flags: 0, zero: [0; 3] };
    unsafe {
        let number = socket(AF_VSOCK, 1, 0);
        if number < 0 {
            return None;
        }
        let file = File::from_raw_fd(number);
        (attach(number, &address, size_of::<VsockAddress>() as u32) == 0).then_some(file)
    }
}

/// Says who we are, as the protocol of the log wants it, and reads nothing but where it begins. What the host
/// acknowledges is not looked at: nothing is ever sent twice.
fn greeted(mut host: File) -> Option<File> {
    let mut hello = b"\xa7hypeman-log 1\r\n".to_vec();
    hello.resize(48, 0);
    host.write_all(&hello).ok()?;
    let mut start = [0; 24];
    std::io::Read::read_exact(&mut host, &mut start).ok()?;
    let mut words = host.try_clone().ok()?;
    thread::spawn(move || std::io::copy(&mut words, &mut std::io::sink()));
    Some(host)
}

/// Where orders come from, and where lines for the log go.
enum Channel {
    Ports { agent: File, log: File },
    Vsock { listener: File, log: Option<File> },
}

impl Channel {
    fn open() -> Self {
        let line = fs::read_to_string("/proc/cmdline").unwrap();
        if !line.contains("hypeman.test.vsock") {
            return Self::Ports { log: port("hypeman.log.0"), agent: port("hypeman.agent.0") };
        }
        let listener = vsock(u32::MAX, AGENT_PORT, bind).unwrap();
        unsafe { listen(listener.as_raw_fd(), 8) };
        Self::Vsock { listener, log: None }
    }

    /// The next conversation. A port has one that never ends.
    fn next(&self) -> File {
        match self {
            Self::Ports { agent, .. } => agent.try_clone().unwrap(),
            Self::Vsock { listener, .. } => loop {
                let number = unsafe { accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) };
                if number >= 0 {
                    return unsafe { File::from_raw_fd(number) };
                }
            },
        }
    }

    fn log(&mut self, line: &str) {
        match self {
            Self::Ports { log, .. } => log.write_all(line.as_bytes()).unwrap(),
            Self::Vsock { log, .. } => loop {
                let open = log.get_or_insert_with(|| loop {
                    if let Some(open) = vsock(HOST, LOG_PORT, connect).and_then(greeted) {
                        break open;
                    }
                    thread::sleep(Duration::from_millis(20));
                });
                match open.write_all(line.as_bytes()) {
                    Ok(()) => return,
                    Err(_) => *log = None,
                }
            },
        }
    }
}

fn mount_at(kind: &str, target: &str) {
    let (kind, target) = (CString::new(kind).unwrap(), CString::new(target).unwrap());
    unsafe { mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
}

fn port(name: &str) -> File {
    loop {
        for entry in fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten() {
            let named = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            if named.trim() == name {
                let device = format!("/dev/{}", entry.file_name().to_string_lossy());
                if let Ok(file) = OpenOptions::new().read(true).write(true).open(device) {
                    return file;
                }
            }
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// A counter that goes up every so many milliseconds, and keeps every value it had in a memory of its own.
static COUNTER: AtomicU64 = AtomicU64::new(0);

fn count(milliseconds: u64) {
    thread::spawn(move || {
        loop {
            COUNTER.fetch_add(1, Ordering::SeqCst);
            thread::sleep(Duration::from_millis(milliseconds));
        }
    });
}

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Memory full of numbers that no other place has.
struct Dirt {
    words: Vec<u64>,
}

impl Dirt {
    fn new(mebibytes: u64, seed: u64) -> Self {
        let mut state = seed.max(1);
        let words = (0..mebibytes << 17).map(|_| random(&mut state)).collect();
        Self { words }
    }

    fn checksum(&self) -> u64 {
        self.words.iter().fold(0, |sum: u64, word| sum.rotate_left(5) ^ word)
    }
}

const BLOCK: usize = 16384;
const BLOCKS: u64 = 64;

/// A writer that keeps in memory what each of its blocks on the disk must hold. It reads a block before it writes
/// it anew, past all caches: a disk that is older or newer than the memory shows.
struct Writer {
    disk: File,
    first: u64,
    expected: Vec<u64>,
    buffer: &'static mut [u64],
    state: u64,
    wrong: Vec<String>,
}

impl Writer {
    fn new(number: u64) -> Self {
        let disk = OpenOptions::new().read(true).write(true).custom_flags(0o40000).open("/dev/vda").unwrap();
        let layout = Layout::from_size_align(BLOCK, 4096).unwrap();
        // Lives as long as the machine.
        let buffer = unsafe { std::slice::from_raw_parts_mut(alloc_zeroed(layout).cast(), BLOCK / 8) };
        Self { disk, first: number * BLOCKS, expected: vec![0; BLOCKS as usize], buffer, state: number + 1, wrong: Vec::new() }
    }

    fn bytes(&mut self) -> &mut [u8] {
        unsafe { std::slice::from_raw_parts_mut(self.buffer.as_mut_ptr().cast(), BLOCK) }
    }

    fn check(&mut self, block: u64) {
        let at = (self.first + block) * BLOCK as u64;
        let disk = self.disk.try_clone().unwrap();
        disk.read_exact_at(self.bytes(), at).unwrap();
        let expected = self.expected[block as usize];
        if let Some(word) = self.buffer.iter().find(|word| **word != expected) {
            self.wrong.push(format!("block {block}: {word} instead of {expected}"));
        }
    }

    fn step(&mut self) {
        let block = random(&mut self.state) % BLOCKS;
        self.check(block);
        let next = self.expected[block as usize] + 1;
        self.buffer.fill(next);
        let at = (self.first + block) * BLOCK as u64;
        let disk = self.disk.try_clone().unwrap();
        disk.write_all_at(self.bytes(), at).unwrap();
        self.expected[block as usize] = next;
    }
}

const POWER_OFF: c_int = 0x4321_fedc;
const RESTART: c_int = 0x0123_4567;

/// Some machines have none, and say so: asked to switch off, their kernel would halt for ever.
fn has_power_switch() -> bool {
    !fs::read_to_string("/proc/cmdline").unwrap().contains("hypeman.end=reset")
}

fn end(command: c_int) -> String {
    unsafe {
        sync();
        reboot(command);
    }
    String::new()
}

struct Load {
    stop: Arc<AtomicBool>,
    writers: Vec<JoinHandle<Writer>>,
}

impl Load {
    fn start(writers: Vec<Writer>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let writers = writers
            .into_iter()
            .map(|mut writer| {
                let stop = Arc::clone(&stop);
                thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        writer.step();
                    }
                    writer
                })
            })
            .collect();
        Self { stop, writers }
    }

    /// Ends the writers and looks at every block: `good`, and how many writes there were.
    fn verdict(self) -> String {
        self.stop.store(true, Ordering::Relaxed);
        let mut writes = 0;
        let mut wrong = Vec::new();
        for writer in self.writers {
            let mut writer = writer.join().unwrap();
            for block in 0..BLOCKS {
                writer.check(block);
            }
            writes += writer.expected.iter().sum::<u64>();
            wrong.append(&mut writer.wrong);
        }
        match wrong.first() {
            None => format!("good {writes}"),
            Some(first) => format!("{} wrong blocks: {first}", wrong.len()),
        }
    }
}

fn main() {
    let mut dirt = Vec::new();
    let mut load = None;
    mount_at("proc", "/proc");
    mount_at("sysfs", "/sys");
    mount_at("devtmpfs", "/dev");
    // Every one of them: what it waits for is not looked at.
    for path in fs::read_to_string("/modules/order").unwrap_or_default().lines().filter_map(|line| line.split(' ').nth(1)) {
        let file = File::open(path).unwrap();
        unsafe { syscall(313, file.as_raw_fd(), c"".as_ptr(), 0) };
    }
    let mut channel = Channel::open();
    let mut answers = channel.next();
    let mut reader = BufReader::new(answers.try_clone().unwrap());
    let mut line = String::new();
    loop {
        line.clear();
        // Nothing to read while the host is not connected.
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            thread::sleep(Duration::from_millis(2));
            if matches!(channel, Channel::Vsock { .. }) {
                answers = channel.next();
                reader = BufReader::new(answers.try_clone().unwrap());
            }
            continue;
        }
        let mut words = line.split_ascii_whitespace();
        let order = words.next().unwrap_or("");
        let number: u64 = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
        let answer = match order {
            "ping" => "pong".to_owned(),
            "release" => fs::read_to_string("/proc/sys/kernel/osrelease").unwrap().trim().to_owned(),
            "command-line" => fs::read_to_string("/proc/cmdline").unwrap().trim().to_owned(),
            "disks" => (0..)
                .map(|index| char::from(b'a' + index))
                .map_while(|letter| fs::read_to_string(format!("/sys/block/vd{letter}/size")).ok())
                .map(|size| (size.trim().parse::<u64>().unwrap() * 512).to_string())
                .collect::<Vec<_>>()
                .join(" "),
            "read-only" => fs::read_to_string("/sys/block/vda/ro").unwrap().trim().to_owned(),
            "read" => {
                let start = std::time::Instant::now();
                let mut bytes = vec![0; number as usize];
                std::io::Read::read_exact(&mut File::open("/dev/vda").unwrap(), &mut bytes).unwrap();
                start.elapsed().as_millis().to_string()
            }
            "fill" => {
                // Writes through to the disk, 64 KiB at a time.
                let mut disk = OpenOptions::new().write(true).open("/dev/vda").unwrap();
                let block = vec![0xa5; 65536];
                let outcome = (0..number).try_for_each(|_| disk.write_all(&block)).and_then(|()| disk.sync_all());
                format!("{outcome:?}")
            }
            "count" => {
                count(number.max(1));
                "counting".to_owned()
            }
            "counter" => COUNTER.load(Ordering::SeqCst).to_string(),
            "dirty" => {
                dirt.push(Dirt::new(number, dirt.len() as u64 + 1));
                "dirty".to_owned()
            }
            // Forgets what was dirtied last.
            "clean" => {
                dirt.pop();
                "clean".to_owned()
            }
            "checksum" => dirt.iter().map(|dirt: &Dirt| format!("{:x}", dirt.checksum())).collect::<Vec<_>>().join(" "),
            "load" => {
                load = Some(Load::start((0..number).map(Writer::new).collect()));
                "loaded".to_owned()
            }
            "verdict" => load.take().map_or("no load".to_owned(), |load: Load| load.verdict()),
            "memory" => fs::read_to_string("/proc/meminfo").unwrap().lines().next().unwrap_or("").to_owned(),
            "free" => fs::read_to_string("/proc/meminfo").unwrap().lines().nth(1).unwrap_or("").to_owned(),
            "net" => fs::read_to_string("/sys/class/net/eth0/address").unwrap_or_default().trim().to_owned(),
            "flood" => {
                for count in 0..number {
                    channel.log(&format!("line {count}\n"));
                }
                "flooded".to_owned()
            }
            "console" => {
                fs::write("/dev/console", "words on the console\n").unwrap();
                "written".to_owned()
            }
            "poweroff" => end(if has_power_switch() { POWER_OFF } else { RESTART }),
            "reboot" => end(RESTART),
            "panic" => {
                fs::write("/proc/sysrq-trigger", "c").unwrap();
                String::new()
            }
            "die" => panic!("init ends, so the kernel panics"),
            _ => "what?".to_owned(),
        };
        // The host may be gone meanwhile.
        let _ = answers.write_all(format!("{answer}\n").as_bytes());
    }
}
