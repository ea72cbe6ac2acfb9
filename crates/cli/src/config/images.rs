//! How images are fetched: credentials, certificates, and the way to the registries.

use std::path::PathBuf;
use std::str::FromStr;

use hypeman_engine::ImageOptions;

use super::Values;
use crate::error::CliError;

/// A file of certificates larger than this is not one.
const LARGEST_AUTHORITIES: u64 = 4 << 20;
/// How each certificate of a PEM file begins.
const CERTIFICATE: &str = "-----BEGIN CERTIFICATE-----";

/// What the engine is told about images.
///
/// # Errors
/// When a value makes no sense, or the file of certificates cannot be read.
pub(super) fn options(values: &Values) -> Result<ImageOptions, CliError> {
    let realms: Vec<Realm> = values.list(
        "images.trusted_realms",
        "write REGISTRY=HOST, both without ports, such as registry.example.com=login.example.net",
    )?;
    Ok(ImageOptions {
        compress: values.parsed("images.compress", "write true or false")?,
        insecure_registries: values.list("images.insecure_registries", "write host[:port]")?,
        docker_config: values.path("docker_config").or_else(dockers_own),
        trusted_realms: realms
            .into_iter()
            .map(|realm| (realm.registry, realm.service))
            .collect(),
        extra_roots: authorities(values)?,
        proxy: proxy(values)?,
    })
}

/// Where Docker keeps the credentials of the server's user.
fn dockers_own() -> Option<PathBuf> {
    Some(std::env::home_dir()?.join(".docker/config.json"))
}

/// A registry and the token service that may see its credentials.
struct Realm {
    registry: String,
    service: String,
}

impl FromStr for Realm {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let host = |text: &str| {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-');
            let text = text.trim().to_ascii_lowercase();
            (!text.is_empty() && text.bytes().all(plain)).then_some(text)
        };
        let (registry, service) = text.split_once('=').ok_or(())?;
        Ok(Self {
            registry: host(registry).ok_or(())?,
            service: host(service).ok_or(())?,
        })
    }
}

/// Certificate authorities besides the system's, as the file has them.
fn authorities(values: &Values) -> Result<Vec<Vec<u8>>, CliError> {
    let Some(path) = values.path("images.ca_file") else {
        return Ok(Vec::new());
    };
    let shown = path.display();
    let failed = |failure| CliError::io(format!("images.ca_file: cannot read {shown}"), failure);
    let size = std::fs::metadata(&path).map_err(failed)?.len();
    let text = match size {
        0..=LARGEST_AUTHORITIES => std::fs::read_to_string(&path).map_err(failed)?,
        _ => String::new(),
    };
    if !text.contains(CERTIFICATE) {
        return Err(CliError::usage_with(
            format!("images.ca_file: {shown} has no certificates"),
            "name a file of certificates in PEM",
        ));
    }
    Ok(vec![text.into_bytes()])
}

/// The proxy. It may hold a password, so errors do not show it.
fn proxy(values: &Values) -> Result<Option<String>, CliError> {
    let proxy = values.text("images.proxy");
    match &proxy {
        Some(address) if !address.starts_with("http://") && !address.starts_with("https://") => Err(
            CliError::usage_with("images.proxy is no web address", "write http://host:port"),
        ),
        _ => Ok(proxy),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn options_of(yaml: &str) -> Result<ImageOptions, CliError> {
        let mut values = Values::default();
        values.add_yaml(yaml, Path::new("config.yaml"))?;
        options(&values)
    }

    #[test]
    fn dockers_own_credentials_are_used_unless_another_file_is_named() {
        let home = std::env::home_dir().unwrap();
        assert_eq!(
            options_of("").unwrap().docker_config,
            Some(home.join(".docker/config.json"))
        );
        assert_eq!(
            options_of("docker_config: /etc/hypeman/registries.json")
                .unwrap()
                .docker_config,
            Some("/etc/hypeman/registries.json".into())
        );
    }

    #[test]
    fn a_trusted_realm_belongs_to_one_registry() {
        let options =
            options_of("images: {trusted_realms: [Registry.example.com=login.example.net, a.b = c.d]}")
                .unwrap();
        let pair = |registry: &str, service: &str| (registry.to_owned(), service.to_owned());
        assert_eq!(
            options.trusted_realms,
            [
                pair("registry.example.com", "login.example.net"),
                pair("a.b", "c.d")
            ]
        );
        for wrong in ["login.example.net", "a=", "=b", "a=https://b", "a=b:443", "a=b=c"] {
            let refused = options_of(&format!("images: {{trusted_realms: ['{wrong}']}}"));
            assert!(refused.is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_file_of_certificates_is_handed_on_and_any_other_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("ca.pem");
        let named = || options_of(&format!("images: {{ca_file: {}}}", file.display()));
        assert!(named().is_err(), "there is no such file");
        std::fs::write(&file, "no certificate").unwrap();
        assert!(named().is_err());
        let pem = format!("{CERTIFICATE}\nAAAA\n-----END CERTIFICATE-----\n");
        std::fs::write(&file, &pem).unwrap();
        assert_eq!(named().unwrap().extra_roots, [pem.into_bytes()]);
    }

    #[test]
    fn a_proxy_is_an_address_and_no_error_shows_its_password() {
        let proxy = |address: &str| options_of(&format!("images: {{proxy: '{address}'}}"));
        assert_eq!(
            proxy("http://p:3128").unwrap().proxy.as_deref(),
            Some("http://p:3128")
        );
        let refused = proxy("me:secret@p:3128").unwrap_err();
        assert!(!format!("{refused} {refused:?}").contains("secret"));
    }
}
