//! System calls on descriptors that are borrowed and non-blocking; errors are errno values, EINTR is repeated.

use crate::tunnels::UdpAddr;

/// Faults that no network and no packet can cause: the descriptor, or the device behind it, is gone
/// (EBADF, ENOTSOCK, EFAULT, EBADFD).
pub fn is_lost(number: i32) -> bool {
    todo!("{number}")
}

/// A kernel socket address made from ours, as `sendto` wants it.
#[derive(Clone, Copy)]
pub struct SockAddr {
    /// Storage for either family.
    pub storage: libc::sockaddr_storage,
    /// Bytes in use.
    pub len: libc::socklen_t,
}

impl SockAddr {
    /// As `datapath.sockaddr.to_sockaddr`: for a dual-stack or an IPv4 socket; None if that cannot send there.
    pub fn to(address: &UdpAddr, dual: bool) -> Option<Self> {
        todo!("{address:?} {dual}")
    }

    /// As `datapath.sockaddr.from_sockaddr`: 4-in-6 becomes IPv4, a link-local address keeps its scope.
    pub fn from(&self) -> UdpAddr {
        todo!()
    }
}

/// Whether a descriptor is readable now.
pub fn is_readable(descriptor: i32) -> bool {
    todo!("{descriptor}")
}

/// Wait until a descriptor takes more; whether it does.
pub fn wait_writable(descriptor: i32, limit_ms: i32) -> bool {
    todo!("{descriptor} {limit_ms}")
}

/// Whether a UDP socket is of AF_INET6.
pub fn is_ipv6_socket(descriptor: i32) -> Result<bool, i32> {
    todo!("{descriptor}")
}

/// `readv` into `buffers`.
pub fn readv(descriptor: i32, buffers: &mut [libc::iovec]) -> Result<usize, i32> {
    todo!("{descriptor} {}", buffers.len())
}

/// `write` of one buffer.
pub fn write(descriptor: i32, data: &[u8]) -> Result<usize, i32> {
    todo!("{descriptor} {}", data.len())
}

/// What one `recvmsg` gave: `bytes` of datagrams of `stride` bytes each (the last may be shorter), from `source`.
#[derive(Clone, Copy)]
pub struct Received {
    /// All bytes.
    pub bytes: usize,
    /// Of each datagram; `bytes` if it is one.
    pub stride: usize,
    /// There was more than fits.
    pub is_cut: bool,
    /// The sender.
    pub source: UdpAddr,
}

/// `recvmsg` with the UDP_GRO control message.
pub fn receive(descriptor: i32, buffer: &mut [u8]) -> Result<Received, i32> {
    todo!("{descriptor} {}", buffer.len())
}

/// `sendmsg` of `data` to `target`, cut by the kernel every `segment` bytes if that is given (UDP_SEGMENT).
pub fn send(
    descriptor: i32,
    data: &[u8],
    target: &SockAddr,
    segment: Option<u16>,
) -> Result<(), i32> {
    todo!("{descriptor} {} {} {segment:?}", data.len(), target.len)
}

/// Wake whoever waits on an eventfd.
pub fn ring_bell(descriptor: i32) {
    todo!("{descriptor}")
}
