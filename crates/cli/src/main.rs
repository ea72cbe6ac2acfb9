//! The `hypeman` binary: everything is in the library beside it.

fn main() -> std::process::ExitCode {
    hypeman_cli::main()
}
