//! What is shown to a program that is in its jail already, and hidden from it again.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;

use hypeman_jail::{Show, hide_from, show_to};
use rustix::fs::Mode;
use rustix::thread::UnshareFlags;

use super::scene;

/// Does it as a server would whose service manager gave it a strict mask.
#[allow(unsafe_code, reason = "only this thread's mask is to change")]
fn with_a_strict_mask<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: the descriptor table stays shared, so no descriptor changes its meaning.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }.unwrap();
            rustix::process::umask(Mode::RWXG | Mode::RWXO);
            work()
        });
        thread.join().unwrap()
    })
}

#[test]
fn what_is_shown_later_has_the_rights_that_were_asked_for_and_goes_out_of_sight_when_hidden() {
    let Some(scene) = scene() else { return };
    let directory = scene.data().join("volumes/deep");
    fs::create_dir_all(&directory).unwrap();
    let [own, shared, secret] = ["own", "shared", "secret"].map(|name| {
        let path = directory.join(name);
        fs::write(&path, name).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path
    });
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let keep = [OwnedFd::from(theirs)];
    let orders = [
        ("line", keep[0].as_raw_fd().to_string()),
        ("own", own.display().to_string()),
        ("shared", shared.display().to_string()),
        ("secret", secret.display().to_string()),
    ];
    let confined = scene.start(&scene.spec(), &orders, &keep, None);
    // If it ends before its time, reading ends too.
    drop(keep);
    ours.read_exact(&mut [0]).unwrap();
    with_a_strict_mask(|| {
        show_to(confined.pid, &Show::own(&own)).unwrap();
        show_to(confined.pid, &Show::shared(&shared)).unwrap();
    });
    ours.write_all(b"!").unwrap();
    ours.read_exact(&mut [0]).unwrap();
    with_a_strict_mask(|| {
        hide_from(confined.pid, &own).unwrap();
        hide_from(confined.pid, &shared).unwrap();
    });
    // Neither twice, nor what was never shown, nor what the jail itself is made of.
    for nothing in [&own, &secret, &directory] {
        let error = hide_from(confined.pid, nothing).unwrap_err();
        assert!(error.to_string().contains("cannot hide"), "{error}");
    }
    ours.write_all(b"!").unwrap();
    ours.read_exact(&mut [0]).unwrap();
    show_to(confined.pid, &Show::own(&own)).unwrap();
    ours.write_all(b"!").unwrap();
    let tried = scene.finish(confined);
    tried.expect("early read", &["ENOENT"]);
    tried.expect("read of its own", &["done"]);
    tried.expect("write to its own", &["done"]);
    tried.expect("removal of its own", &["EACCES"]);
    tried.expect("read of what is shared", &["done"]);
    tried.expect("write to what is shared", &["EROFS", "EACCES"]);
    tried.expect("read of what lies beside", &["ENOENT"]);
    tried.expect("list beside", &["own shared"]);
    tried.expect("make of a file beside", &["EACCES"]);
    for hidden in [
        "length of its own when hidden",
        "length of what is shared when hidden",
    ] {
        assert_eq!(tried.number(hidden), 0);
    }
    tried.expect("write where its own was", &["EACCES"]);
    tried.expect("removal of what is left", &["EACCES"]);
    tried.expect("what it has open", &["own"]);
    tried.expect("write when shown again", &["done"]);
    assert_eq!(fs::read(&own).unwrap(), b"own");
    let about = |path| fs::metadata(path).unwrap();
    assert_eq!(Some(about(&own).uid()), tried.confined.report.user);
    assert_eq!((about(&shared).uid(), about(&shared).mode() & 0o777), (0, 0o640));
    assert_eq!((about(&secret).uid(), about(&secret).mode() & 0o777), (0, 0o600));
}

#[test]
fn nothing_is_granted_or_hidden_where_there_is_no_jail_or_no_process() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "ours").unwrap();
    let owner = || fs::metadata(&file).unwrap().uid();
    let before = owner();
    // It sees the host's files anyway.
    show_to(std::process::id(), &Show::own(&file)).unwrap();
    let mut gone = std::process::Command::new("true").spawn().unwrap();
    gone.wait().unwrap();
    let error = show_to(gone.id(), &Show::own(&file)).unwrap_err();
    assert!(error.to_string().contains("cannot show"), "{error}");
    assert_eq!(owner(), before);
    hide_from(std::process::id(), &file).unwrap();
    assert_eq!(fs::read(&file).unwrap(), b"ours");
    let error = hide_from(gone.id(), &file).unwrap_err();
    assert!(error.to_string().contains("cannot hide"), "{error}");
}
