//! Names: host name, resolvers and machine id, in the kernel and in the container's files.

use std::{
    fs::{self, File},
    io::{self, Write},
    net::Ipv4Addr,
};

use hypeman_guest_api::NetworkConfig;
use rustix::system::sethostname;

const BUS_MACHINE_ID: &str = "/var/lib/dbus/machine-id";

/// Puts all of them in force, as far as it goes. `Err` names what did not: an instance that boots can live with
/// files that an odd image does not let be written, one that was forked would go on under another's name.
pub(super) fn apply(
    hostname: &str,
    instance_id: &str,
    network: Option<&NetworkConfig>,
) -> Result<(), String> {
    sethostname(hostname.as_bytes()).map_err(|error| format!("host name: {error}"))?;
    if let Err(error) = fs::create_dir_all("/etc") {
        return Err(format!("/etc: {error}"));
    }
    let address = network.map(|network| network.address);
    let mut failures = Vec::new();
    let mut replace = |path: &str, content: &str| {
        if let Err(error) = write_anew(path, content) {
            failures.push(format!("{path}: {error}"));
        }
    };
    let machine_id = format!("{}\n", machine_id(instance_id));
    replace("/etc/hostname", &format!("{hostname}\n"));
    replace("/etc/hosts", &hosts(hostname, address));
    replace("/etc/machine-id", &machine_id);
    // Often a link to the other; where it is a copy, it must not keep the id of another instance.
    if fs::symlink_metadata(BUS_MACHINE_ID).is_ok_and(|about| about.is_file()) {
        replace(BUS_MACHINE_ID, &machine_id);
    }
    if let Some(network) = network
        && !network.dns.is_empty()
    {
        let lines: String = network
            .dns
            .iter()
            .map(|server| format!("nameserver {server}\n"))
            .collect();
        replace("/etc/resolv.conf", &lines);
    }
    match failures.is_empty() {
        true => Ok(()),
        false => Err(failures.join("; ")),
    }
}

fn hosts(hostname: &str, address: Option<Ipv4Addr>) -> String {
    let own = address.unwrap_or(Ipv4Addr::new(127, 0, 1, 1));
    format!(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\nff02::1\tip6-allnodes\n\
         ff02::2\tip6-allrouters\n{own}\t{hostname}\n"
    )
}

/// 128 bits of a hash, as the file's format wants them. Never the id itself, which others may know.
fn machine_id(instance_id: &str) -> String {
    let hash = blake3::derive_key("hypeman 2026 machine-id", instance_id.as_bytes());
    hash[..16].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes a file, in the place of a link too: images link to files that only their own init would make.
///
/// Cut to its length only after it was written: a file that was emptied first is written to the disk by the file system
/// when it is closed, for which a copy would wait before it goes on.
fn write_anew(path: &str, content: &str) -> io::Result<()> {
    if fs::symlink_metadata(path).is_ok_and(|about| about.is_symlink()) {
        fs::remove_file(path)?;
    }
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    file.write_all(content.as_bytes())?;
    file.set_len(content.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::{hosts, machine_id};

    #[test]
    fn machine_ids_are_stable_and_differ() {
        let id = machine_id("a");
        assert_eq!(id.len(), 32);
        assert!(id.bytes().all(|byte| byte.is_ascii_hexdigit()));
        assert_eq!(id, machine_id("a"));
        assert_ne!(id, machine_id("b"));
    }

    #[test]
    fn the_own_name_always_resolves() {
        assert!(hosts("web", None).contains("127.0.1.1\tweb\n"));
        assert!(hosts("web", Some([10, 0, 0, 2].into())).contains("10.0.0.2\tweb\n"));
    }
}
