//! Writing to the machine protocol's socket, which also carries descriptors.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use async_trait::async_trait;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::unix::OwnedWriteHalf;

/// The writing end of a connection.
#[async_trait]
pub(super) trait Wire: Send + 'static {
    /// Writes all of it; the descriptor arrives with the first byte.
    async fn send(&mut self, bytes: &[u8], descriptor: Option<OwnedFd>) -> io::Result<()>;
}

#[async_trait]
impl Wire for OwnedWriteHalf {
    async fn send(&mut self, bytes: &[u8], descriptor: Option<OwnedFd>) -> io::Result<()> {
        let Some(descriptor) = descriptor else {
            return self.write_all(bytes).await;
        };
        let sent = self
            .as_ref()
            .async_io(Interest::WRITABLE, || {
                let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut ancillary = SendAncillaryBuffer::new(&mut space);
                let descriptors = [descriptor.as_fd()];
                ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
                let words = [io::IoSlice::new(bytes)];
                let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
                Ok(sendmsg(self.as_ref(), &words, &mut ancillary, flags)?)
            })
            .await?;
        self.write_all(&bytes[sent..]).await
    }
}

#[cfg(test)]
#[async_trait]
impl Wire for tokio::io::WriteHalf<tokio::io::DuplexStream> {
    async fn send(&mut self, bytes: &[u8], _: Option<OwnedFd>) -> io::Result<()> {
        self.write_all(bytes).await
    }
}
