//! Answers that come before the whole request was read.
//!
//! A client that still sends when we close gets its connection reset, and may lose the answer over it: it would see
//! a broken pipe instead of "no space left". So what a handler left of the body is read and dropped for a while, and
//! the connection goes on if that was all of it.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::header;
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use futures::StreamExt as _;
use hyper::body::{Body as HttpBody, Frame, SizeHint};

/// How long the rest of a body is read, and how many bytes of it.
const PATIENCE: Duration = Duration::from_secs(5);
const MOST: usize = 256 << 20;

/// Lends the body to the handler and reads what it leaves.
pub async fn linger(request: Request, next: Next) -> Response {
    // Who asks before sending does not send after a refusal.
    if request.body().is_end_stream() || request.headers().contains_key(header::EXPECT) {
        return next.run(request).await;
    }
    let (parts, body) = request.into_parts();
    let owned = Arc::new(Mutex::new(Some(body)));
    let lent = Body::new(Lent(Arc::clone(&owned)));
    let response = next.run(Request::from_parts(parts, lent)).await;
    // A handler that keeps the body goes on reading it.
    let left = Arc::into_inner(owned).and_then(|body| lock(&body).take());
    if let Some(body) = left.filter(|body| !body.is_end_stream()) {
        tokio::spawn(drain(body));
    }
    response
}

async fn drain(body: Body) {
    let mut rest = body.into_data_stream();
    let mut read = 0;
    let reading = async {
        while let Some(Ok(bytes)) = rest.next().await {
            read += bytes.len();
            if read > MOST {
                return;
            }
        }
    };
    let _ = tokio::time::timeout(PATIENCE, reading).await;
}

fn lock(body: &Mutex<Option<Body>>) -> MutexGuard<'_, Option<Body>> {
    body.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The body as a handler has it. Empty once its end, or an error, was seen.
struct Lent(Arc<Mutex<Option<Body>>>);

impl HttpBody for Lent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let mut body = lock(&self.0);
        let Some(owned) = body.as_mut() else {
            return Poll::Ready(None);
        };
        let frame = Pin::new(owned).poll_frame(context);
        if matches!(frame, Poll::Ready(None | Some(Err(_)))) {
            *body = None;
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        lock(&self.0).as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        lock(&self.0)
            .as_ref()
            .map_or_else(|| SizeHint::with_exact(0), HttpBody::size_hint)
    }
}
