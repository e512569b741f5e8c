//! System calls on descriptors that are borrowed and non-blocking.
//!
//! ```text
//! TUN  -> readv   -> sealer        seal ring -> drains -> send  -> UDP
//! UDP  -> receive -> opener        open ring -> drains -> write -> TUN
//! ```
//!
//! Errors are errno values; what they mean is for the caller to know. A call that a signal interrupted is made again.
//! Nothing waits but `wait_writable`, for as long as it is told. Knows how the kernel spells addresses and
//! control messages; knows nothing of rings and packets.
//!
//! Source: as `nebula_mp.datapath.batches` and `sockaddr`: udp(7), ipv6(7), cmsg(3), eventfd(2); Linux
//! include/uapi/linux/udp.h; RFC 4291 section 2.5.5.2 (4-in-6), RFC 4007 (scopes).

use std::mem::{size_of, MaybeUninit};
use std::ptr;
use std::slice;
use std::time::Instant;

use crate::tunnels::UdpAddr;

/// Room for the control messages of one call: one of four bytes or less, and as much again.
const CONTROL_BYTES: usize = 48;

/// Bytes of `::ffff:` in front of an IPv4 address in an IPv6 one.
const MAPPED: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF];

/// Faults that no network and no packet can cause: the descriptor, or the device behind it, is gone
/// (EBADF, ENOTSOCK, EFAULT, EBADFD).
pub fn is_lost(number: i32) -> bool {
    matches!(
        number,
        libc::EBADF | libc::ENOTSOCK | libc::EFAULT | libc::EBADFD
    )
}

/// An address as the kernel spells it.
#[derive(Clone, Copy)]
pub struct SockAddr {
    spelling: Spelling,
    len: libc::socklen_t,
}

/// Either family's; all begin with the number of the family. Every byte is initialised.
#[derive(Clone, Copy)]
#[repr(C)]
union Spelling {
    family: libc::sa_family_t,
    ipv4: libc::sockaddr_in,
    ipv6: libc::sockaddr_in6,
}

impl SockAddr {
    const IPV4_BYTES: libc::socklen_t = size_of::<libc::sockaddr_in>() as libc::socklen_t;
    const IPV6_BYTES: libc::socklen_t = size_of::<libc::sockaddr_in6>() as libc::socklen_t;

    fn unnamed() -> Self {
        // SAFETY: the structs consist of integers, for which zero is a value.
        let spelling = unsafe { MaybeUninit::<Spelling>::zeroed().assume_init() };
        Self { spelling, len: 0 }
    }

    /// As `datapath.sockaddr.to_sockaddr`: for a dual-stack or an IPv4 socket; None if that cannot send there.
    pub fn to(address: &UdpAddr, dual: bool) -> Option<Self> {
        let mut found = Self::unnamed();
        if address.family == 4 && !dual {
            found.spelling.ipv4 = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: address.port.to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from_ne_bytes([
                        address.ip[0],
                        address.ip[1],
                        address.ip[2],
                        address.ip[3],
                    ]),
                },
                sin_zero: [0; 8],
            };
            found.len = Self::IPV4_BYTES;
            return Some(found);
        }
        if !dual {
            return None;
        }
        let (ip, scope) = if address.family == 4 {
            let mut mapped = [0; 16];
            mapped[..12].copy_from_slice(&MAPPED);
            mapped[12..].copy_from_slice(&address.ip[..4]);
            (mapped, 0)
        } else {
            (address.ip, address.scope)
        };
        found.spelling.ipv6 = libc::sockaddr_in6 {
            sin6_family: libc::AF_INET6 as libc::sa_family_t,
            sin6_port: address.port.to_be(),
            sin6_flowinfo: 0,
            sin6_addr: libc::in6_addr { s6_addr: ip },
            sin6_scope_id: scope,
        };
        found.len = Self::IPV6_BYTES;
        Some(found)
    }

    /// As `datapath.sockaddr.from_sockaddr`: 4-in-6 becomes IPv4, a link-local address keeps its scope. None if it
    /// is of another family, or none at all.
    pub fn address(&self) -> Option<UdpAddr> {
        if self.len < size_of::<libc::sa_family_t>() as libc::socklen_t {
            return None;
        }
        // SAFETY: every member begins with the family, and all bytes are initialised.
        let family = i32::from(unsafe { self.spelling.family });
        let mut ip = [0; 16];
        if family == libc::AF_INET && self.len >= Self::IPV4_BYTES {
            // SAFETY: a struct of integers in initialised bytes.
            let it = unsafe { self.spelling.ipv4 };
            ip[..4].copy_from_slice(&it.sin_addr.s_addr.to_ne_bytes());
            return Some(UdpAddr {
                ip,
                family: 4,
                port: u16::from_be(it.sin_port),
                scope: 0,
            });
        }
        if family != libc::AF_INET6 || self.len < Self::IPV6_BYTES {
            return None;
        }
        // SAFETY: a struct of integers in initialised bytes.
        let it = unsafe { self.spelling.ipv6 };
        let raw = it.sin6_addr.s6_addr;
        let is_mapped = raw[..12] == MAPPED;
        let is_link_local = raw[0] == 0xFE && raw[1] & 0xC0 == 0x80;
        if is_mapped {
            ip[..4].copy_from_slice(&raw[12..]);
        } else {
            ip = raw;
        }
        Some(UdpAddr {
            ip,
            family: if is_mapped { 4 } else { 6 },
            port: u16::from_be(it.sin6_port),
            scope: if is_link_local { it.sin6_scope_id } else { 0 },
        })
    }
}

/// The number of the error of the call that just failed.
fn number() -> i32 {
    // SAFETY: the C library's errno of this thread is always readable.
    unsafe { *libc::__errno_location() }
}

/// Make a call until no signal interrupts it; below 0 is a failure.
#[inline]
fn repeat(mut call: impl FnMut() -> isize) -> Result<usize, i32> {
    loop {
        if let Ok(result) = usize::try_from(call()) {
            return Ok(result);
        }
        let error = number();
        if error != libc::EINTR {
            return Err(error);
        }
    }
}

/// Sleep until one of these has what is asked of it, or has failed, at most `limit_ms`; gives how many do. EINTR is an
/// error like others.
pub fn poll(sources: &mut [libc::pollfd], limit_ms: i32) -> Result<usize, i32> {
    let count = sources.len() as libc::nfds_t;
    // SAFETY: `count` of them, ours.
    let found = unsafe { libc::poll(sources.as_mut_ptr(), count, limit_ms) };
    usize::try_from(found).map_err(|_| number())
}

/// Wait for `events`, at most `limit_ms`; whether there was any, or an error, which the next call will show.
fn wait(descriptor: i32, events: i16, limit_ms: i32) -> bool {
    let mut left_ms = limit_ms;
    let begun = (limit_ms > 0).then(Instant::now);
    loop {
        let mut source = libc::pollfd {
            fd: descriptor,
            events,
            revents: 0,
        };
        match poll(slice::from_mut(&mut source), left_ms) {
            Ok(found) => return found > 0,
            Err(libc::EINTR) => {}
            Err(_) => return false,
        }
        if let Some(begun) = begun {
            let passed = i32::try_from(begun.elapsed().as_millis()).unwrap_or(i32::MAX);
            left_ms = limit_ms.saturating_sub(passed).max(0);
        }
    }
}

/// Whether a descriptor is readable now.
pub fn is_readable(descriptor: i32) -> bool {
    wait(descriptor, libc::POLLIN, 0)
}

/// Wait until a descriptor takes more, at most `limit_ms`; whether it does.
pub fn wait_writable(descriptor: i32, limit_ms: i32) -> bool {
    wait(descriptor, libc::POLLOUT, limit_ms)
}

/// Whether a socket is of AF_INET6.
pub fn is_ipv6_socket(descriptor: i32) -> Result<bool, i32> {
    let mut domain: libc::c_int = 0;
    let mut size = size_of::<libc::c_int>() as libc::socklen_t;
    repeat(|| {
        // SAFETY: an int, and its size.
        let result = unsafe {
            libc::getsockopt(
                descriptor,
                libc::SOL_SOCKET,
                libc::SO_DOMAIN,
                (&raw mut domain).cast(),
                &raw mut size,
            )
        };
        result as isize
    })?;
    Ok(domain == libc::AF_INET6)
}

/// `read` into one buffer.
pub fn read(descriptor: i32, buffer: &mut [u8]) -> Result<usize, i32> {
    // SAFETY: the buffer is borrowed for the call.
    repeat(|| unsafe { libc::read(descriptor, buffer.as_mut_ptr().cast(), buffer.len()) })
}

/// `readv` into `buffers`, of which there are at most 1024.
///
/// # Safety
///
/// Each of them is memory that may be written, and that nobody else uses during the call.
pub unsafe fn readv(descriptor: i32, buffers: &[libc::iovec]) -> Result<usize, i32> {
    debug_assert!(buffers.len() <= 1024);
    // SAFETY: by our own contract.
    repeat(|| unsafe { libc::readv(descriptor, buffers.as_ptr(), buffers.len() as libc::c_int) })
}

/// `write` of one buffer.
pub fn write(descriptor: i32, data: &[u8]) -> Result<usize, i32> {
    // SAFETY: the data is borrowed for the call.
    repeat(|| unsafe { libc::write(descriptor, data.as_ptr().cast(), data.len()) })
}

/// What one `receive` gave: `bytes` of datagrams of `stride` bytes each, but the last may be shorter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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

/// Aligned for `cmsghdr`.
#[repr(C, align(8))]
struct Control([u8; CONTROL_BYTES]);

/// Take what comes next: a datagram, or several of one sender's that the kernel has joined (UDP_GRO). With EAGAIN
/// there is nothing; with ENOTSOCK it was no UDP socket, of which every datagram has a sender.
pub fn receive(descriptor: i32, buffer: &mut [u8]) -> Result<Received, i32> {
    let mut source = SockAddr::unnamed();
    let mut control = Control([0; CONTROL_BYTES]);
    let mut part = libc::iovec {
        iov_base: buffer.as_mut_ptr().cast(),
        iov_len: buffer.len(),
    };
    // SAFETY: integers and pointers, for which zero is a value.
    let mut message = unsafe { MaybeUninit::<libc::msghdr>::zeroed().assume_init() };
    message.msg_name = (&raw mut source.spelling).cast();
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    let bytes = repeat(|| {
        message.msg_namelen = size_of::<Spelling>() as libc::socklen_t;
        message.msg_controllen = CONTROL_BYTES;
        // SAFETY: everything the message points to is ours, as long as it says, and outlives the call.
        unsafe { libc::recvmsg(descriptor, &raw mut message, libc::MSG_DONTWAIT) }
    })?;
    // More than we have room for is said to have been there: no address of UDP.
    source.len = if message.msg_namelen as usize <= size_of::<Spelling>() {
        message.msg_namelen
    } else {
        0
    };
    let mut stride = bytes;
    if message.msg_controllen > 0 {
        if let Some(found) = joined_bytes(&message) {
            stride = found;
        }
    }
    Ok(Received {
        bytes: bytes.min(buffer.len()),
        stride: if 0 < stride && stride < bytes {
            stride
        } else {
            bytes
        },
        is_cut: message.msg_flags & libc::MSG_TRUNC != 0,
        source: source.address().ok_or(libc::ENOTSOCK)?,
    })
}

/// The size of the datagrams that were joined, if the kernel states one.
fn joined_bytes(message: &libc::msghdr) -> Option<usize> {
    let mut found = None;
    // SAFETY: the kernel has filled `msg_controllen` bytes of an aligned buffer, which the macros do not leave; the data
    // of a message need not be aligned.
    unsafe {
        let mut at = libc::CMSG_FIRSTHDR(message);
        while !at.is_null() {
            let header = ptr::read(at);
            let is_whole = header.cmsg_len >= libc::CMSG_LEN(4) as usize;
            if header.cmsg_level == libc::SOL_UDP && header.cmsg_type == libc::UDP_GRO && is_whole {
                let value = ptr::read_unaligned(libc::CMSG_DATA(at).cast::<libc::c_int>());
                found = Some(usize::try_from(value).unwrap_or(0));
            }
            at = libc::CMSG_NXTHDR(message, at);
        }
    }
    found
}

/// Send `data` to `target`: as one datagram, or cut by the kernel every `segment` bytes (UDP_SEGMENT).
pub fn send(
    descriptor: i32,
    data: &[u8],
    target: &SockAddr,
    segment: Option<u16>,
) -> Result<(), i32> {
    let name: *const Spelling = &raw const target.spelling;
    let Some(segment) = segment else {
        repeat(|| {
            // SAFETY: data and address are borrowed for the call, and as long as it is told.
            unsafe {
                libc::sendto(
                    descriptor,
                    data.as_ptr().cast(),
                    data.len(),
                    libc::MSG_DONTWAIT,
                    name.cast(),
                    target.len,
                )
            }
        })?;
        return Ok(());
    };
    let mut control = Control([0; CONTROL_BYTES]);
    let mut part = libc::iovec {
        iov_base: data.as_ptr().cast_mut().cast(),
        iov_len: data.len(),
    };
    // SAFETY: integers and pointers, for which zero is a value.
    let mut message = unsafe { MaybeUninit::<libc::msghdr>::zeroed().assume_init() };
    message.msg_name = name.cast_mut().cast();
    message.msg_namelen = target.len;
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    // SAFETY: only calculates.
    message.msg_controllen = unsafe { libc::CMSG_SPACE(2) } as usize;
    // SAFETY: the control buffer is aligned and has room for one message of two bytes; the data need not be aligned.
    unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_UDP;
        (*header).cmsg_type = libc::UDP_SEGMENT;
        (*header).cmsg_len = libc::CMSG_LEN(2) as usize;
        ptr::write_unaligned(libc::CMSG_DATA(header).cast::<u16>(), segment);
    }
    // SAFETY: everything the message points to outlives the call, which only reads it.
    repeat(|| unsafe { libc::sendmsg(descriptor, &raw const message, libc::MSG_DONTWAIT) })?;
    Ok(())
}

/// Wake whoever waits on an eventfd. Rung 2^64 - 2 times already, it wakes anyway; another failure is not possible on
/// a descriptor that is one.
pub fn ring_bell(descriptor: i32) {
    let _ = write(descriptor, &1_u64.to_ne_bytes());
}

#[cfg(all(test, not(miri)))]
mod tests;
