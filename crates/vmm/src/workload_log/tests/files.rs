//! Files that are rotated, removed, or full, and servers that are killed.

use std::process::{Child, Command, Stdio};

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use super::*;

/// Names the directory in which this process is a server to be killed.
const SERVER: &str = "HYPEMAN_TEST_LOG_SERVER";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_changes_files_under_a_flood_without_losing_or_doubling_a_byte() {
    let place = Place::new();
    let log = place.listen();
    let mut guest = place.guest();
    let flood = async {
        for _ in 0..400 {
            guest.fill(50_000);
            guest.step().await;
        }
        guest.deliver().await;
    };
    let rotate = async {
        for _ in 0..40 {
            rename(&place.log());
            tokio::task::yield_now().await;
            log.reopen().await.unwrap();
            assert!(place.log().exists());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::join!(flood, rotate);
    assert!(place.content() == guest.printed);
}

#[tokio::test]
async fn a_rotation_that_was_cut_anywhere_is_finished_by_the_next_server() {
    let place = Place::new();
    let mut guest = place.guest();
    let fresh = beside(&place.log(), ".new");
    for round in 0..3 {
        let log = place.listen();
        guest.print(format!("{round}: before ").as_bytes());
        guest.deliver().await;
        rename(&place.log());
        if round > 0 {
            log.reopen().await.unwrap();
        }
        if round > 1 {
            // As it is a moment before the new file gets its name, when something has come already.
            guest.print(b"in the new file ");
            guest.deliver().await;
            fs::rename(place.log(), &fresh).unwrap();
        }
        drop(log);
        guest.stream = None;
        let log = place.listen();
        assert!(place.log().exists() && !fresh.exists());
        guest.print(b"after ");
        guest.deliver().await;
        drop(log);
    }
    assert_eq!(place.content(), guest.printed);
}

#[tokio::test]
async fn a_file_that_was_removed_takes_nothing_with_it_but_itself() {
    let place = Place::new();
    let log = place.listen();
    let mut guest = place.guest();
    guest.print(b"removed");
    guest.deliver().await;
    fs::remove_file(place.log()).unwrap();
    guest.stream = None;
    drop(log);
    let log = place.listen();
    guest.print(b"kept ");
    guest.deliver().await;
    // Somebody empties it while it is written.
    fs::File::options()
        .write(true)
        .open(place.log())
        .unwrap()
        .set_len(0)
        .unwrap();
    guest.print(b"and this ");
    guest.deliver().await;
    guest.stream = None;
    drop(log);
    let _log = place.listen();
    guest.print(b"and that");
    guest.deliver().await;
    assert_eq!(place.content(), b"and this and that");
}

#[tokio::test]
async fn a_full_disk_loses_nothing() {
    let place = Place::new();
    fs::create_dir_all(place.log().parent().unwrap()).unwrap();
    std::os::unix::fs::symlink("/dev/full", place.log()).unwrap();
    let log = place.listen();
    let mut guest = place.guest();
    guest.print(b"waits");
    guest.connect().await;
    let told = tokio::time::timeout(RETRY / 2, guest.deliver()).await;
    assert!(told.is_err());
    // Room again, in another file.
    log.reopen().await.unwrap();
    guest.deliver().await;
    assert_eq!(fs::read(place.log()).unwrap(), b"waits");
}

/// A small file system of its own.
struct Mounted(TempDir);

impl Mounted {
    /// `None` for those who may not mount.
    fn new(options: &str) -> Option<Mounted> {
        let mounted = Mounted(tempfile::tempdir().unwrap());
        if !mounted.mount(options) {
            println!("SKIPPED: mounting a small tmpfs needs root");
            return None;
        }
        Some(mounted)
    }

    fn mount(&self, options: &str) -> bool {
        let mut command = Command::new("mount");
        command
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(self.0.path());
        command
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: the log's task is gone, and its files closed, only with the runtime.
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn a_disk_that_fills_up_and_is_emptied_again_loses_nothing() {
    let Some(disk) = Mounted::new("size=300k") else {
        return;
    };
    let place = Place::new();
    let path = disk.0.path().join("app.log");
    let _log = WorkloadLog::listen(&place.socket(), &path).unwrap();
    let mut guest = place.guest();
    guest.fill(800_000);
    // As much as has room, and no more is acknowledged than that.
    let full = tokio::time::timeout(RETRY * 3, guest.deliver()).await;
    assert!(full.is_err());
    let written = fs::read(&path).unwrap();
    assert!(written.len() > 100_000 && guest.printed.starts_with(&written));
    // A guest that comes again meanwhile finds the same.
    guest.stream = None;
    let full = tokio::time::timeout(RETRY, guest.deliver()).await;
    assert!(full.is_err());
    assert!(disk.mount("remount,size=2m"));
    guest.deliver().await;
    assert!(fs::read(&path).unwrap() == guest.printed);
}

/// What the child of the test below does until it is killed.
fn be_a_server(directory: &str) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let directory = Path::new(directory);
        let path = directory.join("logs/app.log");
        let log = WorkloadLog::listen(&directory.join("vsock_2223"), &path).unwrap();
        loop {
            tokio::time::sleep(Duration::from_millis(3)).await;
            rename(&path);
            log.reopen().await.unwrap();
        }
    });
}

struct Server(Child);

impl Server {
    fn start(place: &Place) -> Server {
        let (_crate, module) = module_path!().split_once("::").unwrap();
        let name = format!("{module}::a_server_that_is_killed_at_any_instant_loses_and_doubles_nothing");
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", &name])
            .env(SERVER, place.0.path())
            .stdout(Stdio::null());
        Server(command.spawn().unwrap())
    }

    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn a_server_that_is_killed_at_any_instant_loses_and_doubles_nothing() {
    if let Ok(directory) = std::env::var(SERVER) {
        return be_a_server(&directory);
    }
    let place = Place::new();
    let mut guest = place.guest();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let mut random = TestRunner::deterministic();
    let mut any = |most: u64| (0..=most).new_tree(&mut random).unwrap().current();
    for _ in 0..30 {
        let server = Server::start(&place);
        runtime.block_on(async {
            guest.connect().await;
            let until = tokio::time::Instant::now() + Duration::from_micros(any(30_000));
            while tokio::time::Instant::now() < until {
                guest.fill(usize::try_from(any(20_000)).unwrap());
                let _ = tokio::time::timeout_at(until, guest.step()).await;
            }
        });
        server.kill();
    }
    let server = Server::start(&place);
    runtime.block_on(guest.deliver());
    server.kill();
    // The last one may have been killed in the middle of a rotation.
    let _guard = runtime.enter();
    drop(place.listen());
    let content = place.content();
    println!(
        "{} bytes in {} files",
        content.len(),
        fs::read_dir(place.0.path().join("logs")).unwrap().count()
    );
    assert!(
        content == guest.printed,
        "{} bytes instead of {}",
        content.len(),
        guest.printed.len()
    );
}
