//! The bare limit of an HTTP answer: hyper with bytes that are ready in memory.

use std::convert::Infallible;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::path::Path;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;

use crate::error::{BenchError, Result};

/// Serves the bytes of `file` to every request, until killed; prints its address first.
///
/// # Errors
/// It cannot listen.
pub fn serve(file: &Path) -> Result<()> {
    let fail = |error| BenchError::io("serve", error);
    let body = Bytes::from(std::fs::read(file).map_err(fail)?);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(fail)?;
    runtime.block_on(async move {
        let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .map_err(fail)?;
        let address = listener.local_addr().map_err(fail)?;
        let mut output = std::io::stdout();
        writeln!(output, "{address}")
            .and_then(|()| output.flush())
            .map_err(fail)?;
        loop {
            let (stream, _) = listener.accept().await.map_err(fail)?;
            stream.set_nodelay(true).map_err(fail)?;
            let body = body.clone();
            tokio::spawn(async move {
                let service = service_fn(move |_: Request<hyper::body::Incoming>| {
                    let mut response = Response::new(Full::new(body.clone()));
                    response
                        .headers_mut()
                        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
                    async move { Ok::<_, Infallible>(response) }
                });
                // A client that goes away ends its connection and nothing else.
                let _ = http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    })
}
