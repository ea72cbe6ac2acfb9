//! TLS: certificates are checked, and an operator's own authority can be added.
//!
//! A registry on loopback is spoken to in HTTP, but its token service is wherever it says, so that one has TLS here.

use std::net::SocketAddr;
use std::sync::Arc;

use hypeman_images::ImageError;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::rustls;

use super::auth::want_token;
use super::support::{Registry, amd64, client, client_with, noise};

/// A token service with a certificate for `name`; answers each connection with a token.
async fn token_service(name: &str) -> (SocketAddr, String) {
    let mut authority = rcgen::CertificateParams::new(Vec::new()).unwrap();
    authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let authority_key = rcgen::KeyPair::generate().unwrap();
    let root = authority.self_signed(&authority_key).unwrap().pem();
    let issuer = rcgen::Issuer::new(authority, authority_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = rcgen::CertificateParams::new([name.to_owned()])
        .unwrap()
        .signed_by(&key, &issuer)
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            key.serialize_der().try_into().unwrap(),
        )
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            let Ok(mut connection) = acceptor.accept(connection).await else {
                continue;
            };
            let mut request = [0; 4096];
            let _ = connection.read(&mut request).await;
            let body = r#"{"token":"t0ken"}"#;
            let head = format!(
                "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            let _ = connection.write_all(format!("{head}{body}").as_bytes()).await;
            let _ = connection.shutdown().await;
        }
    });
    (address, root)
}

async fn registry_with_realm(realm: SocketAddr) -> Registry {
    let registry = Registry::start().await;
    registry.add_image(&["v1"], "amd64", &[noise(1, 10)]);
    want_token(
        &registry,
        format!("https://localhost:{}/token", realm.port()),
        "t0ken",
    );
    registry
}

#[tokio::test]
async fn an_operators_authority_is_trusted_besides_the_systems() {
    let (service, root) = token_service("localhost").await;
    let registry = registry_with_realm(service).await;
    let client = client_with(|options| options.extra_roots = vec![root.into_bytes()]);
    client
        .resolve(&registry.reference("app:v1"), &amd64(), None)
        .await
        .unwrap();
}

#[tokio::test]
async fn an_unknown_authority_and_a_wrong_name_are_refused() {
    let (service, _) = token_service("localhost").await;
    let registry = registry_with_realm(service).await;
    let error = client()
        .resolve(&registry.reference("app:v1"), &amd64(), None)
        .await
        .unwrap_err();
    assert!(matches!(error, ImageError::Network { .. }), "{error}");

    let (service, root) = token_service("other.example").await;
    let registry = registry_with_realm(service).await;
    let client = client_with(|options| options.extra_roots = vec![root.into_bytes()]);
    let error = client
        .resolve(&registry.reference("app:v1"), &amd64(), None)
        .await
        .unwrap_err();
    assert!(
        error.to_string().to_lowercase().contains("certificate"),
        "{error}"
    );
}
