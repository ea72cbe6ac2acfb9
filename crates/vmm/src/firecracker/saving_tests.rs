//! What a device state costs a machine, told by a thread that answers at its socket as Firecracker does.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use super::files::{Files, HOLD, STATE};
use super::machine::FirecrackerMachine;
use crate::console::Console;
use crate::process::ProcessHandle;
use crate::rest::RestClient;
use crate::workload_log::WorkloadLog;
use crate::{Machine, MachineSpec, MemoryBacking, ProcessIdentity, VmmError};

fn spec(directory: &Path) -> MachineSpec {
    MachineSpec {
        id: "machine-1".to_owned(),
        runtime_directory: directory.to_owned(),
        cpus: 1,
        memory_bytes: 64 << 20,
        memory: MemoryBacking::Anonymous,
        hotplug_bytes: 0,
        kernel: PathBuf::from("/k/vmlinux"),
        initramfs: PathBuf::from("/k/initramfs"),
        kernel_arguments: Vec::new(),
        disks: Vec::new(),
        host_devices: Vec::new(),
        nic: None,
        workload_log: directory.join("app.log"),
        vmm_log: directory.join("vmm.log"),
    }
}

/// A machine whose Firecracker is to be played. Its process is this one.
fn machine(directory: &Path) -> (FirecrackerMachine, Files) {
    let spec = spec(directory);
    let files = Files::of(directory);
    files.prepare(&spec).unwrap();
    let identity = ProcessIdentity::read(std::process::id()).unwrap();
    let process = ProcessHandle::of_recorded(&identity).unwrap().unwrap();
    let client = RestClient::new(files.api_socket(), Arc::new(process));
    let console = Console::new(spec.vmm_log.clone(), None);
    let log = WorkloadLog::listen(&files.log_socket(), &spec.workload_log).unwrap();
    let machine = FirecrackerMachine::new(client, files.clone(), console, None, None, &spec, log);
    (machine, files)
}

/// Answers so many requests, which all have a body, and tells what was asked. `saves`: device states are written.
fn play(files: &Files, requests: usize, saves: bool) -> JoinHandle<Vec<String>> {
    let listener = UnixListener::bind(files.api_socket()).unwrap();
    let own = files.own().path().to_owned();
    std::thread::spawn(move || {
        let answered = (0..requests).map(|_| {
            let (mut stream, _) = listener.accept().unwrap();
            let asked = read(&mut stream);
            if !asked.starts_with("PUT /snapshot/create") {
                stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap();
                return asked;
            }
            // Waits until somebody reads, and then finds that it is no file for memory.
            let pipe = saves.then(|| {
                std::fs::write(own.join(STATE), b"devices").unwrap();
                let mut memory = std::fs::File::options();
                memory.write(true).open(own.join(HOLD)).unwrap()
            });
            let words = r#"{"fault_message":"no"}"#;
            let refusal = format!("HTTP/1.1 400 \r\nContent-Length: {}\r\n\r\n{words}", words.len());
            stream.write_all(refusal.as_bytes()).unwrap();
            drop(pipe);
            asked
        });
        answered.collect()
    })
}

/// The first two words of a request.
fn read(stream: &mut UnixStream) -> String {
    let mut request = Vec::new();
    let mut buffer = [0; 4096];
    while !request.ends_with(b"}") {
        let count = stream.read(&mut buffer).unwrap();
        assert!(count > 0, "it hung up");
        request.extend_from_slice(&buffer[..count]);
    }
    let request = String::from_utf8(request).unwrap();
    let words: Vec<_> = request.split_whitespace().take(2).collect();
    words.join(" ")
}

#[tokio::test]
async fn a_state_that_is_refused_leaves_a_machine_that_waits_for_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let (machine, files) = machine(directory.path());
    let firecracker = play(&files, 2, false);
    let refused = machine.save_devices().await;
    assert!(matches!(refused, Err(VmmError::Refused { .. })), "{refused:?}");
    assert!(!files.hold().exists());
    // Nobody knows how far it came: its guest may have been told.
    assert!(machine.connections_have_ended());
    assert!(!machine.connections_have_ended());
    machine.resume().await.unwrap();
    assert_eq!(firecracker.join().unwrap(), ["PUT /snapshot/create", "PATCH /vm"]);
}

#[tokio::test]
async fn a_machine_stands_still_from_its_state_on_and_not_before() {
    let directory = tempfile::tempdir().unwrap();
    let (machine, files) = machine(directory.path());
    // Whoever takes memory and disk is told to wait for the state.
    assert!(!machine.rests_while_saving());
    let firecracker = play(&files, 2, true);
    assert_eq!(machine.save_devices().await.unwrap(), b"devices");
    assert!(files.hold().exists() && !firecracker.is_finished());
    assert!(!files.own().join(STATE).exists());
    machine.resume().await.unwrap();
    assert!(!files.hold().exists());
    assert_eq!(firecracker.join().unwrap(), ["PUT /snapshot/create", "PATCH /vm"]);
}
