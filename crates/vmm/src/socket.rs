//! Waiting for a socket that a starting VMM makes by itself.

use std::io;
use std::path::Path;
use std::time::Duration;

use tokio::net::UnixStream;

use crate::{VmmError, files::io_error};

/// The first pause; a VMM that takes longer is looked at less often.
const SOON: Duration = Duration::from_micros(500);
const SELDOM: Duration = Duration::from_millis(20);

/// Resolves once somebody accepts connections. The name of a socket appears before it does, so connections are tried.
pub(crate) async fn until_it_listens(socket: &Path, deadline: Duration) -> Result<(), VmmError> {
    let attempts = async {
        let mut pause = SOON;
        loop {
            match UnixStream::connect(socket).await {
                Ok(_) => return Ok(()),
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                    ) => {}
                Err(error) => return Err(io_error("cannot connect to", socket)(error)),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(SELDOM);
        }
    };
    match tokio::time::timeout(deadline, attempts).await {
        Ok(outcome) => outcome,
        Err(_) => Err(VmmError::Unresponsive {
            command: "connect".to_owned(),
            after: deadline,
        }),
    }
}
