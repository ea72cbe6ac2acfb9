//! Under which registry's name a pushed image appears: that by which the client addressed this server.
//!
//! The server cannot know all names of its own: it may stand behind a proxy. So the client's `Host` counts, unless it
//! is that of a registry known to be another's: who may only push here must not be able to put something in the place
//! of an image that comes from there.

use std::collections::BTreeSet;

use hypeman_images::Reference;

use crate::EngineError;

/// Registries that many people pull from, by the end of their host names.
const PUBLIC: [&str; 17] = [
    "docker.io",
    "docker.com",
    "ghcr.io",
    "quay.io",
    "gcr.io",
    "pkg.dev",
    "public.ecr.aws",
    "mcr.microsoft.com",
    "azurecr.io",
    "registry.k8s.io",
    "registry.gitlab.com",
    "registry.fedoraproject.org",
    "registry.redhat.io",
    "registry.access.redhat.com",
    "docker.elastic.co",
    "nvcr.io",
    "cgr.dev",
];

/// The registry part of the names of images that are pushed to `host`, a `Host` header. `elsewhere` are registries that
/// this server pulled from.
///
/// # Errors
/// `invalid_name`: not a host, or that of another registry.
pub(super) fn own_registry(host: &str, elsewhere: &BTreeSet<String>) -> Result<String, EngineError> {
    // A name without a dot or a port would be read as the first part of a repository on Docker Hub.
    let host = match host {
        "localhost" => host.to_owned(),
        _ if host.contains(['.', ':']) => host.to_owned(),
        _ => format!("{host}:80"),
    };
    let registry = Reference::parse(&format!("{host}/name"))?.registry().to_owned();
    let name = registry
        .rsplit_once(':')
        .map_or(registry.as_str(), |(name, _)| name);
    let name = name.trim_end_matches('.');
    let public = |known: &str| name == known || name.ends_with(&format!(".{known}"));
    let private = name.contains(".dkr.ecr.") && name.contains(".amazonaws.com");
    if private || PUBLIC.iter().any(|known| public(known)) || elsewhere.contains(&registry) {
        return Err(EngineError::invalid(
            "invalid_name",
            format!("{registry} is another registry; push to this server's own address"),
        ));
    }
    Ok(registry)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(host: &str) -> Option<String> {
        let elsewhere = BTreeSet::from(["registry.example.com".to_owned(), "10.0.0.5:5000".to_owned()]);
        own_registry(host, &elsewhere).ok()
    }

    #[test]
    fn a_server_goes_by_the_name_that_its_client_uses() {
        for host in [
            "localhost",
            "localhost:8080",
            "127.0.0.1:43555",
            "[::1]:8080",
            "hypeman.example.com",
            "registry.example.com:8080",
            "10.0.0.5:8080",
            "notdocker.io",
            "ec2-1-2-3-4.compute.amazonaws.com:8080",
        ] {
            assert_eq!(own(host).as_deref(), Some(host));
        }
        assert_eq!(own("HypeMan.Example.Com").unwrap(), "hypeman.example.com");
        assert_eq!(own("hypeman").unwrap(), "hypeman:80");
    }

    #[test]
    fn nobody_pushes_in_another_registrys_name() {
        for host in [
            "docker.io",
            "docker.io:443",
            "index.docker.io",
            "registry-1.docker.io",
            "Registry-1.Docker.IO",
            "registry.hub.docker.com",
            "ghcr.io",
            "eu.gcr.io",
            "europe-docker.pkg.dev",
            "123456789012.dkr.ecr.eu-west-1.amazonaws.com",
            "registry.example.com",
            "10.0.0.5:5000",
            "",
            "a b",
            "docker.io/library",
            "docker.io.",
            "host:port",
            "host/../x",
        ] {
            assert_eq!(own(host), None, "{host:?}");
        }
    }
}
