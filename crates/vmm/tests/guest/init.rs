//! The guest of the tests: takes orders over the agent's port, one word (and a number) a line.
//! Built by the tests with `rustc`, not part of any crate.

use std::ffi::{CString, c_char, c_int, c_long, c_ulong, c_void};
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

unsafe extern "C" {
    fn mount(source: *const c_char, target: *const c_char, kind: *const c_char, flags: c_ulong, data: *const c_void) -> c_int;
    fn reboot(command: c_int) -> c_int;
    fn sync();
    fn syscall(number: c_long, ...) -> c_long;
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

fn main() {
    mount_at("proc", "/proc");
    mount_at("sysfs", "/sys");
    mount_at("devtmpfs", "/dev");
    for path in fs::read_to_string("/modules/order").unwrap_or_default().lines() {
        let file = File::open(path).unwrap();
        unsafe { syscall(313, file.as_raw_fd(), c"".as_ptr(), 0) };
    }
    let mut log = port("hypeman.log.0");
    let agent = port("hypeman.agent.0");
    let mut answers = agent.try_clone().unwrap();
    let mut reader = BufReader::new(agent);
    let mut line = String::new();
    loop {
        line.clear();
        // Nothing to read while the host is not connected.
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            thread::sleep(Duration::from_millis(2));
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
            "net" => fs::read_to_string("/sys/class/net/eth0/address").unwrap_or_default().trim().to_owned(),
            "flood" => {
                for count in 0..number {
                    log.write_all(format!("line {count}\n").as_bytes()).unwrap();
                }
                "flooded".to_owned()
            }
            "console" => {
                fs::write("/dev/console", "words on the console\n").unwrap();
                "written".to_owned()
            }
            "poweroff" => unsafe {
                sync();
                reboot(0x4321_fedc_u32 as c_int);
                String::new()
            },
            "reboot" => unsafe {
                sync();
                reboot(0x0123_4567);
                String::new()
            },
            "panic" => {
                fs::write("/proc/sysrq-trigger", "c").unwrap();
                String::new()
            }
            "die" => panic!("init ends, so the kernel panics"),
            _ => "what?".to_owned(),
        };
        answers.write_all(format!("{answer}\n").as_bytes()).unwrap();
    }
}
