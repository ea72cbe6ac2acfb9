//! Stories against the real kernel, each in network namespaces of its own, as root.
//!
//! A story runs itself again under `unshare --net`, so it never sees the host's network and leaves nothing: its
//! namespaces end with its processes. VMs are played by the test, which holds their TAPs and speaks Ethernet.

mod frames;
mod isolation;
mod lab;
mod lifecycle;
