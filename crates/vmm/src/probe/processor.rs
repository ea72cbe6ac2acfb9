//! What the processor of this host is, as `/proc/cpuinfo` tells it.

/// What the host's processor is called; tells one rate of the counter from another.
pub(crate) fn processor_name() -> String {
    name_in(&processors())
}

/// What the host's processor is and can, in short: a guest that sees it cannot go on on another one.
pub(crate) fn processor_abilities() -> String {
    abilities_in(&processors())
}

fn processors() -> String {
    std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default()
}

/// Names and values of the first processor in `/proc/cpuinfo`.
fn first_processor(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let first = text.split("\n\n").next().unwrap_or_default();
    first
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.trim(), value.trim()))
}

fn name_in(text: &str) -> String {
    let name = first_processor(text)
        .find(|(name, _)| *name == "model name")
        .map(|(_, value)| value);
    name.map_or_else(|| abilities_in(text), str::to_owned)
}

/// The names are those of x86 and of ARM; the list of abilities is long, so it is hashed.
fn abilities_in(text: &str) -> String {
    let words = first_processor(text).filter_map(|(name, value)| match name {
        "vendor_id" | "cpu family" | "model" | "stepping" | "CPU implementer" | "CPU part" => {
            Some(value.to_owned())
        }
        "flags" | "Features" => Some(format!("{:016x}", fnv1a(value.as_bytes()))),
        _ => None,
    });
    words.collect::<Vec<_>>().join(" ")
}

fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_told_apart_by_what_a_guest_can_see() {
        let text = "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 85\nmodel name\t: Xeon @ 2.60GHz\n\
            stepping\t: 7\ncpu MHz\t\t: 2600.1\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nvendor_id\t: Other\n";
        assert_eq!(name_in(text), "Xeon @ 2.60GHz");
        let abilities = abilities_in(text);
        assert!(abilities.starts_with("GenuineIntel 6 85 7 "), "{abilities}");
        assert_eq!(abilities, abilities_in(&text.replace("2600.1", "1200.0")));
        assert_ne!(abilities, abilities_in(&text.replace("avx2", "avx512f")));
        assert_eq!(
            name_in("CPU implementer : 0x41\nCPU part : 0xd0c\n"),
            "0x41 0xd0c"
        );
    }
}
