//! A TAP of the host's network for a program that sees an empty one.

use std::fs::{self, File};
use std::io;
use std::os::unix::net::UnixDatagram;

use hypeman_jail::{Item, Lent, Tap};

use super::intruder::{Request, TAP};
use super::scene;

const MTU: i32 = 1400;

/// A TAP that is up, as long as the file is open. `None`, with the reason printed, where this host makes none.
fn make(name: &str) -> Option<File> {
    let make = || -> io::Result<File> {
        let file = File::options().read(true).write(true).open("/dev/net/tun")?;
        Request::new(name, TAP).send(&file, libc::TUNSETIFF as libc::c_ulong)?;
        let socket = UnixDatagram::unbound()?;
        Request::new(name, MTU).send(&socket, libc::SIOCSIFMTU as libc::c_ulong)?;
        Request::new(name, libc::IFF_UP).send(&socket, libc::SIOCSIFFLAGS as libc::c_ulong)?;
        Ok(file)
    };
    make()
        .inspect_err(|error| println!("SKIPPED: no TAP here: {error}"))
        .ok()
}

/// How many frames came from whoever has the TAP.
fn frames(name: &str) -> u64 {
    let path = format!("/sys/class/net/{name}/statistics/rx_packets");
    fs::read_to_string(path).unwrap().trim().parse().unwrap()
}

#[test]
fn a_program_gets_its_tap_and_sees_no_network() {
    let Some(scene) = scene() else { return };
    for described in [true, false] {
        let name = format!("hj{}{}", u8::from(described), std::process::id());
        let Some(file) = make(&name) else { return };
        let lent = Lent::Tap(Tap {
            name: name.clone(),
            file: file.try_clone().unwrap(),
            described,
        });
        let tried = scene.intrude(&scene.spec(), &[("tap", name.clone())], Some(lent));
        tried.expect("look at /dev/net/tun", &["ENOENT"]);
        tried.expect("attachment", &["done"]);
        // Who asks about its TAP is told, and who does not is told nothing any more.
        let (told, mtu) = match described {
            true => ("done", MTU.to_string()),
            false => ("ENOSYS", "ENOSYS".to_owned()),
        };
        tried.expect("address", &[told]);
        tried.expect("flags", &[told]);
        tried.expect("mtu", &[&mtu]);
        tried.expect("attached to", &[&name]);
        tried.expect("length of the header", &["done"]);
        tried.expect("frame", &["done"]);
        assert_eq!(frames(&name), 1);
        for more in ["attachment to another", "another descriptor", "mtu once more"] {
            tried.expect(more, &["ENOSYS"]);
        }
        if tried.has(Item::NetworkNamespace) {
            tried.expect("interfaces", &["lo"]);
        }
    }
}
