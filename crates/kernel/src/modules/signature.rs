//! The signature that a distribution appends to its modules.
//!
//! ```text
//! ELF file │ signature │ description (12 bytes, the last 4: length of the signature) │ mark
//! ```

use std::fs;
use std::path::Path;

const MARK: &[u8] = b"~Module signature appended~\n";
const DESCRIPTION: usize = 12;

/// Whether the kernel may refuse a module without a signature: only what its configuration, beside it under the name
/// that packages give it, denies is denied.
pub(crate) fn are_demanded(kernel: &Path, release: &str) -> bool {
    let beside = kernel.with_file_name(format!("config-{release}"));
    let Ok(configuration) = fs::read_to_string(beside) else {
        return true;
    };
    !configuration
        .lines()
        .any(|line| line == "# CONFIG_MODULE_SIG_FORCE is not set")
}

/// The module without its signature.
pub(crate) fn without_signature(module: &[u8]) -> &[u8] {
    let stripped = || {
        let signed = module.strip_suffix(MARK)?;
        let (signed, description) = signed.split_last_chunk::<DESCRIPTION>()?;
        let [.., a, b, c, d] = *description;
        let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).ok()?;
        signed.get(..signed.len().checked_sub(length)?)
    };
    stripped().unwrap_or(module)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_signature_of_any_length_goes_and_nothing_else(
            module in proptest::collection::vec(any::<u8>(), 0..200),
            signature in proptest::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut signed = [module.as_slice(), &signature, &[0; 8]].concat();
            signed.extend((signature.len() as u32).to_be_bytes());
            signed.extend(MARK);
            prop_assert_eq!(without_signature(&signed), module.as_slice());
            // Not marked, so not signed.
            signed.pop();
            prop_assert_eq!(without_signature(&signed), signed.as_slice());
        }

        #[test]
        fn a_lying_length_changes_nothing(length in 100_u32.., module in proptest::collection::vec(any::<u8>(), 0..80)) {
            let mut signed = module;
            signed.extend([0; 8]);
            signed.extend(length.to_be_bytes());
            signed.extend(MARK);
            prop_assert_eq!(without_signature(&signed), signed.as_slice());
        }
    }

    #[test]
    fn signatures_stay_unless_the_kernel_says_that_it_does_not_insist() {
        let boot = tempfile::tempdir().unwrap();
        let kernel = boot.path().join("vmlinuz-6.1");
        assert!(are_demanded(&kernel, "6.1"));
        let configuration = boot.path().join("config-6.1");
        fs::write(&configuration, "CONFIG_MODULE_SIG=y\nCONFIG_MODULE_SIG_FORCE=y\n").unwrap();
        assert!(are_demanded(&kernel, "6.1"));
        fs::write(
            &configuration,
            "CONFIG_MODULE_SIG=y\n# CONFIG_MODULE_SIG_FORCE is not set\n",
        )
        .unwrap();
        assert!(!are_demanded(&kernel, "6.1"));
    }
}
