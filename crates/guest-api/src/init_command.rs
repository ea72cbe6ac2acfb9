//! Tells an image's own init from an ordinary program.

/// Whether this command is an init system that must be process 1 of the machine.
///
/// The decision looks only at the words, never at the image: a name that only ends in `init` is a program.
pub fn is_init_command(argv: &[String]) -> bool {
    const INITS: [&str; 11] = [
        "/sbin/init",
        "/usr/sbin/init",
        "/bin/init",
        "/init",
        "/lib/systemd/systemd",
        "/usr/lib/systemd/systemd",
        "/bin/systemd",
        "/usr/bin/systemd",
        "/sbin/openrc-init",
        "/sbin/runit-init",
        "/sbin/s6-linux-init",
    ];
    argv.first()
        .is_some_and(|program| INITS.contains(&program.as_str()) || program == "systemd")
}

#[cfg(test)]
mod tests {
    use super::is_init_command;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn inits_are_recognised_with_and_without_arguments() {
        for line in [
            "/sbin/init",
            "/lib/systemd/systemd --unit=multi-user.target",
            "systemd",
        ] {
            assert!(is_init_command(&words(line)), "{line}");
        }
    }

    #[test]
    fn programs_are_not_taken_for_an_init() {
        for line in [
            "",
            "nginx -g daemon",
            "/usr/bin/tini -- /sbin/init",
            "/opt/init",
            "init",
            "/sbin/init.sh",
        ] {
            assert!(!is_init_command(&words(line)), "{line}");
        }
    }
}
