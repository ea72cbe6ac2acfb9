//! What the hostile program tries. It runs in the jail; everything that it says may be its last word.
#![allow(unsafe_code, reason = "it asks the kernel for what no library offers")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use libc::{c_int, c_long};

fn tell(name: &str, outcome: impl std::fmt::Display) {
    println!("TRIED {name}: {outcome}");
    io::stdout().flush().unwrap();
}

fn error_name(error: &io::Error) -> String {
    let names = [
        (libc::EPERM, "EPERM"),
        (libc::ENOENT, "ENOENT"),
        (libc::ESRCH, "ESRCH"),
        (libc::EBADF, "EBADF"),
        (libc::EAGAIN, "EAGAIN"),
        (libc::EACCES, "EACCES"),
        (libc::EINVAL, "EINVAL"),
        (libc::EMFILE, "EMFILE"),
        (libc::EFBIG, "EFBIG"),
        (libc::EROFS, "EROFS"),
        (libc::ENOSYS, "ENOSYS"),
        (libc::ENETUNREACH, "ENETUNREACH"),
    ];
    let number = error.raw_os_error().unwrap_or_default();
    let known = names.iter().find(|(known, _)| *known == number);
    known.map_or_else(|| error.to_string(), |(_, name)| (*name).to_owned())
}

fn attempt<T>(name: &str, outcome: io::Result<T>) {
    match outcome {
        Ok(_) => tell(name, "done"),
        Err(error) => tell(name, error_name(&error)),
    }
}

fn checked(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn call(result: c_long) -> io::Result<c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn names_in(path: &str) -> io::Result<String> {
    let mut names: Vec<String> = fs::read_dir(path)?
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    Ok(names.join(" "))
}

fn list(name: &str, path: &str) {
    match names_in(path) {
        Ok(names) => tell(name, names),
        Err(error) => tell(name, error_name(&error)),
    }
}

#[test]
#[ignore = "started in a jail by the other tests"]
fn attempts() {
    let orders = fs::read_to_string("orders").unwrap();
    let orders: BTreeMap<&str, &str> = orders.lines().filter_map(|line| line.split_once('=')).collect();
    let order = |name: &str| orders.get(name).copied();
    if let Some(bytes) = order("devour") {
        let mut memory = vec![0_u8; bytes.parse().unwrap()];
        memory.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
        tell("memory beyond its limit", memory.len());
        return;
    }
    if let Some(path) = order("memory") {
        return memory(path);
    }
    if let Some(name) = order("tap") {
        return tap(name);
    }
    if let Some(number) = order("line") {
        return later(number, &order);
    }
    files(&order);
    rights(&order);
    network(&order);
    if order("exhaust").is_some() {
        exhaust(&order);
    }
}

type Orders<'a> = &'a dyn Fn(&str) -> Option<&'a str>;

/// `struct ifreq`: a name, and what is said or asked about it.
#[repr(C, align(8))]
pub(crate) struct Request([u8; size_of::<libc::ifreq>()]);

impl Request {
    pub(crate) fn new(name: &str, number: i32) -> Self {
        let mut bytes = [0; size_of::<libc::ifreq>()];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        bytes[libc::IF_NAMESIZE..][..4].copy_from_slice(&number.to_ne_bytes());
        Self(bytes)
    }

    pub(crate) fn name(&self) -> String {
        let name = self.0.split(|byte| *byte == 0).next().unwrap();
        String::from_utf8(name.to_vec()).unwrap()
    }

    pub(crate) fn number(&self) -> i32 {
        i32::from_ne_bytes(self.0[libc::IF_NAMESIZE..][..4].try_into().unwrap())
    }

    /// Says or asks it.
    pub(crate) fn send(&mut self, to: &impl AsRawFd, what: libc::c_ulong) -> io::Result<()> {
        // SAFETY: the kernel reads and writes one whole structure at most.
        checked(unsafe { libc::ioctl(to.as_raw_fd(), what as _, &raw mut *self) }).map(drop)
    }
}

/// How a TAP is opened.
pub(crate) const TAP: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Opens the TAP of this name as Cloud Hypervisor does, and then wants more.
fn tap(name: &str) {
    let open = || -> io::Result<File> {
        // The kernel's own call: libraries differ in how they open a file.
        let flags = libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC;
        let path = c"/dev/net/tun".as_ptr();
        // SAFETY: a string with its end.
        let number = call(unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path, flags) })?;
        // SAFETY: it was opened just now, for this.
        Ok(unsafe { File::from_raw_fd(number as i32) })
    };
    attempt("look at /dev/net/tun", fs::symlink_metadata("/dev/net/tun"));
    let device = open().unwrap();
    let ask = |what: libc::c_ulong| {
        let socket = std::os::unix::net::UnixDatagram::unbound().unwrap();
        let mut request = Request::new(name, 0);
        request.send(&socket, what).map(|()| request.number())
    };
    let attach = |name: &str| Request::new(name, TAP).send(&device, libc::TUNSETIFF as libc::c_ulong);
    attempt("attachment", attach(name));
    attempt("address", ask(libc::SIOCGIFHWADDR as libc::c_ulong));
    attempt("flags", ask(libc::SIOCGIFFLAGS as libc::c_ulong));
    match ask(libc::SIOCGIFMTU as libc::c_ulong) {
        Ok(mtu) => tell("mtu", mtu),
        Err(error) => tell("mtu", error_name(&error)),
    }
    let mut who = Request::new("", 0);
    who.send(&device, libc::TUNGETIFF as libc::c_ulong).unwrap();
    tell("attached to", who.name());
    let mut header = 10;
    // SAFETY: the kernel reads one number.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw mut header) };
    attempt("length of the header", checked(result));
    attempt("frame", (&device).write(&[0; 10 + 60]));
    attempt("attachment to another", attach("other"));
    attempt("another descriptor", open());
    attempt("mtu once more", ask(libc::SIOCGIFMTU as libc::c_ulong));
    network(&|_| None);
}

/// Looks, says that it did, waits until more was shown, and looks again; and once more when that was hidden.
fn later(number: &str, order: Orders<'_>) {
    // SAFETY: it was kept open for this, and nobody else uses it.
    let mut line = unsafe { UnixStream::from_raw_fd(number.parse().unwrap()) };
    let [own, shared, secret] = ["own", "shared", "secret"].map(|name| order(name).unwrap());
    attempt("early read", fs::read(own));
    line.write_all(b"?").unwrap();
    line.read_exact(&mut [0]).unwrap();
    attempt("read of its own", fs::read(own));
    attempt("write to its own", File::options().write(true).open(own));
    attempt("removal of its own", fs::remove_file(own));
    attempt("read of what is shared", fs::read(shared));
    attempt(
        "write to what is shared",
        File::options().write(true).open(shared),
    );
    attempt("read of what lies beside", fs::read(secret));
    let directory = Path::new(own).parent().unwrap();
    list("list beside", directory.to_str().unwrap());
    attempt("make of a file beside", File::create(directory.join("file")));
    let mut open = File::open(own).unwrap();
    line.write_all(b"?").unwrap();
    line.read_exact(&mut [0]).unwrap();
    let length = |path| fs::read(path).unwrap().len();
    tell("length of its own when hidden", length(own));
    tell("length of what is shared when hidden", length(shared));
    attempt("write where its own was", File::options().write(true).open(own));
    attempt("removal of what is left", fs::remove_file(own));
    let mut text = String::new();
    let read = open.read_to_string(&mut text);
    tell(
        "what it has open",
        read.map_or_else(|error| error.to_string(), |_| text),
    );
    line.write_all(b"?").unwrap();
    line.read_exact(&mut [0]).unwrap();
    attempt("write when shown again", File::options().write(true).open(own));
}

fn files(order: Orders<'_>) {
    if let Some(path) = order("read") {
        attempt("read of another's file", fs::read(path));
    }
    if let Some(path) = order("list") {
        list("list of the data directory", path);
    }
    if let Some(path) = order("beside") {
        list("list beside its own", path);
    }
    if let Some(path) = order("write-shared") {
        attempt("read of what is shared", fs::read(path));
        attempt("write to what is shared", File::options().write(true).open(path));
        let text = std::ffi::CString::new(path).unwrap();
        let flags = libc::MS_REMOUNT | libc::MS_BIND;
        // SAFETY: strings with their ends.
        let result = unsafe {
            libc::mount(
                std::ptr::null(),
                text.as_ptr(),
                std::ptr::null(),
                flags,
                std::ptr::null(),
            )
        };
        attempt("remount of what is shared", checked(result));
    }
    if let Some(path) = order("write-own") {
        attempt("write to its own", File::options().write(true).open(path));
    }
    for path in [
        "/etc/shadow",
        "/etc/passwd",
        "/root",
        "/home",
        "/sys",
        "/var",
        "/boot",
    ] {
        attempt(&format!("look at {path}"), fs::symlink_metadata(path));
    }
    for path in [
        "/dev/mem",
        "/dev/kmsg",
        "/dev/vda",
        "/dev/sda",
        "/dev/fuse",
        "/dev/net/tun",
        "/dev/shm",
    ] {
        attempt(&format!("look at {path}"), fs::symlink_metadata(path));
    }
    for (name, path) in [
        ("the root", "/file"),
        ("/usr", "/usr/file"),
        ("/dev", "/dev/file"),
    ] {
        attempt(&format!("make of a file in {name}"), File::create(path));
    }
    // SAFETY: strings with their ends and plain numbers.
    unsafe {
        let device = libc::makedev(254, 0);
        attempt(
            "make of a device",
            checked(libc::mknod(c"device".as_ptr(), libc::S_IFBLK | 0o666, device)),
        );
        let none = std::ptr::null();
        let result = libc::mount(c"tmpfs".as_ptr(), c"/proc".as_ptr(), c"tmpfs".as_ptr(), 0, none);
        attempt("mount", checked(result));
        attempt("change of root", checked(libc::chroot(c".".as_ptr())));
    }
    list("list of the root", "/");
    list("list of the root's parent", "/../../..");
}

fn rights(order: Orders<'_>) {
    tell("own number", std::process::id());
    let processes = names_in("/proc").unwrap_or_default();
    let numbers: Vec<&str> = processes
        .split(' ')
        .filter(|name| name.parse::<u32>().is_ok())
        .collect();
    tell("processes", numbers.join(" "));
    attempt(
        "read of the kernel's settings",
        fs::read("/proc/sys/kernel/hostname"),
    );
    let server: i32 = order("server").and_then(|text| text.parse().ok()).unwrap_or(2);
    // SAFETY: plain numbers, and pointers to nothing where nothing is looked at before the refusal.
    unsafe {
        attempt("signal to the server", checked(libc::kill(server, 0)));
        attempt("trace", call(libc::ptrace(libc::PTRACE_SEIZE, server, 0, 0)));
        let none = std::ptr::null();
        let result = libc::process_vm_readv(server, none, 0, none, 0, 0);
        attempt("read of another's memory", call(result as c_long));
        attempt("become root", call(libc::syscall(libc::SYS_setresuid, 0, 0, 0)));
        attempt(
            "join the root group",
            call(libc::syscall(libc::SYS_setresgid, 0, 0, 0)),
        );
        for (name, flag) in [
            ("user", libc::CLONE_NEWUSER),
            ("mount", libc::CLONE_NEWNS),
            ("network", libc::CLONE_NEWNET),
            ("pid", libc::CLONE_NEWPID),
        ] {
            attempt(&format!("a new {name} namespace"), checked(libc::unshare(flag)));
        }
        let flags = libc::CLONE_NEWUSER | libc::SIGCHLD;
        let child = libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0);
        if child == 0 {
            libc::_exit(0);
        }
        attempt("a new user namespace by clone", call(child));
        attempt(
            "a module",
            call(libc::syscall(libc::SYS_init_module, 0, 0, c"".as_ptr())),
        );
        attempt(
            "a program for the kernel",
            call(libc::syscall(libc::SYS_bpf, 0, 0, 0)),
        );
        attempt("reboot", checked(libc::reboot(libc::RB_DISABLE_CAD)));
    }
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let words: Vec<String> = status
        .lines()
        .filter(|line| {
            ["Uid", "Gid", "Groups", "Cap", "NoNewPrivs", "Seccomp:"]
                .iter()
                .any(|name| line.starts_with(name))
        })
        .map(|line| {
            let (name, value) = line.split_once(':').unwrap();
            format!(
                "{name}={}",
                value.split_whitespace().collect::<Vec<_>>().join(" ")
            )
        })
        .collect();
    tell("status", words.join(", "));
}

fn network(order: Orders<'_>) {
    // SAFETY: plain numbers.
    unsafe {
        attempt(
            "a raw socket",
            checked(libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                0,
            )),
        );
    }
    if let Some(port) = order("port") {
        let address = format!("127.0.0.1:{port}");
        attempt("a connection to the host", std::net::TcpStream::connect(address));
    }
    let mut names = Vec::new();
    // SAFETY: the list is the library's until it is freed, and ends with a null name.
    unsafe {
        let interfaces = libc::if_nameindex();
        let mut at = interfaces;
        while !at.is_null() && !(*at).if_name.is_null() {
            names.push(
                std::ffi::CStr::from_ptr((*at).if_name)
                    .to_string_lossy()
                    .into_owned(),
            );
            at = at.add(1);
        }
        if !interfaces.is_null() {
            libc::if_freenameindex(interfaces);
        }
    }
    tell("interfaces", names.join(" "));
    tell("host name", rustix::system::uname().nodename().to_string_lossy());
}

fn exhaust(order: Orders<'_>) {
    if let (Some(path), Some(limit)) = (order("grow"), order("limit")) {
        let limit: u64 = limit.parse().unwrap();
        let file = File::options().write(true).open(path).unwrap();
        attempt("a hole beyond its limit", file.set_len(limit + 1));
        attempt(
            "a file beyond its limit",
            std::os::unix::fs::FileExt::write_all_at(&file, b"more", limit),
        );
    }
    let mut files = Vec::new();
    let refused = loop {
        match File::open("/dev/null") {
            Ok(file) => files.push(file),
            Err(error) => break error,
        }
    };
    let count = files.len();
    drop(files);
    tell("descriptors", count);
    tell("one more descriptor", error_name(&refused));
    let mut children = Vec::new();
    let refused = loop {
        // SAFETY: the child only waits for its end.
        match checked(unsafe { libc::fork() }) {
            Ok(0) => loop {
                // SAFETY: no arguments.
                unsafe { libc::pause() };
            },
            Ok(child) => children.push(child),
            Err(error) => break error,
        }
    };
    for child in &children {
        // SAFETY: plain numbers.
        unsafe { libc::kill(*child, libc::SIGKILL) };
    }
    tell("processes forked", children.len());
    tell("one more process", error_name(&refused));
}

fn memory(path: &str) {
    let open = |path: &Path| -> io::Result<File> {
        let text = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
        // SAFETY: a string with its end.
        let number = checked(unsafe { libc::open(text.as_ptr(), libc::O_RDWR) })?;
        // SAFETY: it was opened just now, for this.
        Ok(unsafe { File::from_raw_fd(number) })
    };
    attempt(
        "memory by another name",
        open(&Path::new(path).with_file_name("secret")),
    );
    attempt("memory as a file to read", File::open(path));
    let mut file = match open(Path::new(path)) {
        Ok(file) => file,
        Err(error) => return tell("memory", error_name(&error)),
    };
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    tell("memory", text);
    attempt("write to memory", file.write(b"x"));
    let map = |flags: c_int| {
        // SAFETY: a new mapping that nobody uses.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                file.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    };
    attempt("shared mapping of memory", map(libc::MAP_SHARED));
    attempt("private mapping of memory", map(libc::MAP_PRIVATE));
    // SAFETY: plain numbers.
    let result = unsafe {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        libc::fallocate(file.as_raw_fd(), mode, 0, 4096)
    };
    attempt("hole in memory", checked(result));
    let again = format!("/proc/self/fd/{}", file.as_raw_fd());
    attempt(
        "memory for writing through /proc",
        File::options().write(true).open(again),
    );
    attempt("memory once more", open(Path::new(path)));
}
