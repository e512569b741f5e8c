//! Calls on sockets of the loopback interface, and on eventfds.

use super::*;
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

fn ipv4(ip: [u8; 4], port: u16) -> UdpAddr {
    let mut wide = [0; 16];
    wide[..4].copy_from_slice(&ip);
    UdpAddr {
        ip: wide,
        family: 4,
        port,
        scope: 0,
    }
}

fn ipv6(text: &str, port: u16, scope: u32) -> UdpAddr {
    let ip: std::net::Ipv6Addr = text.parse().unwrap();
    UdpAddr {
        ip: ip.octets(),
        family: 6,
        port,
        scope,
    }
}

fn pair(at: &str) -> (UdpSocket, UdpSocket) {
    let sockets = (UdpSocket::bind(at).unwrap(), UdpSocket::bind(at).unwrap());
    sockets.0.set_nonblocking(true).unwrap();
    sockets.1.set_nonblocking(true).unwrap();
    sockets
}

fn address_of(socket: &UdpSocket) -> UdpAddr {
    match socket.local_addr().unwrap() {
        std::net::SocketAddr::V4(it) => ipv4(it.ip().octets(), it.port()),
        std::net::SocketAddr::V6(it) => ipv6(&it.ip().to_string(), it.port(), it.scope_id()),
    }
}

fn set_gro(socket: &UdpSocket) {
    let on: libc::c_int = 1;
    // SAFETY: an int, and its size.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_GRO,
            (&raw const on).cast(),
            4,
        )
    };
    assert_eq!(result, 0);
}

#[test]
fn an_address_comes_back_as_it_was_spelled() {
    for (address, dual) in [
        (ipv4([192, 0, 2, 1], 4242), false),
        (ipv4([192, 0, 2, 1], 4242), true),
        (ipv6("2001:db8::1", 1, 0), true),
        (ipv6("fe80::1", 65_535, 3), true),
    ] {
        let spelled = SockAddr::to(&address, dual).unwrap();
        assert_eq!(spelled.address(), Some(address));
        let bytes = if dual { 28 } else { 16 };
        assert_eq!(spelled.len, bytes);
    }
}

#[test]
fn an_ipv4_socket_cannot_send_to_ipv6() {
    assert!(SockAddr::to(&ipv6("2001:db8::1", 1, 0), false).is_none());
}

#[test]
fn only_a_link_local_address_has_a_scope() {
    let spelled = SockAddr::to(&ipv6("2001:db8::1", 1, 7), true).unwrap();
    assert_eq!(spelled.address(), Some(ipv6("2001:db8::1", 1, 0)));
}

#[test]
fn what_the_kernel_did_not_name_has_no_address() {
    assert_eq!(SockAddr::unnamed().address(), None);
}

#[test]
fn a_datagram_arrives_with_its_sender() {
    for at in ["127.0.0.1:0", "[::1]:0"] {
        let (near, far) = pair(at);
        let dual = is_ipv6_socket(near.as_raw_fd()).unwrap();
        assert_eq!(dual, at.starts_with('['));
        let target = SockAddr::to(&address_of(&far), dual).unwrap();
        send(near.as_raw_fd(), b"hello", &target, None).unwrap();

        let mut buffer = [0; 64];
        assert!(is_readable(far.as_raw_fd()));
        let found = receive(far.as_raw_fd(), &mut buffer).unwrap();

        assert_eq!(&buffer[..5], b"hello");
        let expected = Received {
            bytes: 5,
            stride: 5,
            is_cut: false,
            source: address_of(&near),
        };
        assert_eq!(found, expected);
        assert!(!is_readable(far.as_raw_fd()));
        assert_eq!(receive(far.as_raw_fd(), &mut buffer), Err(libc::EAGAIN));
    }
}

#[test]
fn a_train_is_cut_by_the_kernel_and_joined_where_the_receiver_asks_for_it() {
    let (near, far) = pair("127.0.0.1:0");
    let target = SockAddr::to(&address_of(&far), false).unwrap();
    let train: Vec<u8> = (0..250).collect();
    let mut buffer = [0; 2048];

    send(near.as_raw_fd(), &train, &target, Some(100)).unwrap();
    for piece in train.chunks(100) {
        let found = receive(far.as_raw_fd(), &mut buffer).unwrap();
        assert_eq!((found.bytes, found.stride), (piece.len(), piece.len()));
        assert_eq!(&buffer[..found.bytes], piece);
    }

    set_gro(&far);
    send(near.as_raw_fd(), &train, &target, Some(100)).unwrap();
    let found = receive(far.as_raw_fd(), &mut buffer).unwrap();
    assert_eq!((found.bytes, found.stride, found.is_cut), (250, 100, false));
    assert_eq!(&buffer[..250], &train[..]);
}

#[test]
fn what_does_not_fit_is_said_to_be_cut() {
    let (near, far) = pair("127.0.0.1:0");
    let target = SockAddr::to(&address_of(&far), false).unwrap();
    let mut buffer = [0; 8];

    send(near.as_raw_fd(), &[1; 9], &target, None).unwrap();
    let found = receive(far.as_raw_fd(), &mut buffer).unwrap();
    assert_eq!((found.bytes, found.is_cut), (8, true));

    send(near.as_raw_fd(), &[1; 8], &target, None).unwrap();
    let found = receive(far.as_raw_fd(), &mut buffer).unwrap();
    assert_eq!((found.bytes, found.is_cut), (8, false));
}

#[test]
fn an_empty_datagram_is_one() {
    let (near, far) = pair("127.0.0.1:0");
    let target = SockAddr::to(&address_of(&far), false).unwrap();
    send(near.as_raw_fd(), &[], &target, None).unwrap();

    let found = receive(far.as_raw_fd(), &mut [0; 8]).unwrap();

    assert_eq!((found.bytes, found.stride), (0, 0));
}

#[test]
fn reads_and_writes_give_the_kernels_numbers() {
    assert_eq!(write(-1, b"x"), Err(libc::EBADF));
    assert_eq!(read(-1, &mut [0]), Err(libc::EBADF));
    assert_eq!(receive(-1, &mut [0]), Err(libc::EBADF));
    assert_eq!(is_ipv6_socket(-1), Err(libc::EBADF));
    let (near, _) = pair("127.0.0.1:0");
    let target = SockAddr::to(&ipv4([127, 0, 0, 1], 9), false).unwrap();
    let huge = vec![0; 65_508];
    let refused = send(near.as_raw_fd(), &huge, &target, None);
    assert_eq!(refused, Err(libc::EMSGSIZE));
    assert!(is_lost(libc::EBADF) && is_lost(libc::EBADFD) && !is_lost(libc::EIO));
}

#[test]
fn a_read_is_scattered_in_order() {
    let (near, far) = pair("127.0.0.1:0");
    let target = SockAddr::to(&address_of(&far), false).unwrap();
    send(near.as_raw_fd(), b"abcdef", &target, None).unwrap();
    let (mut first, mut second) = ([0_u8; 2], [0_u8; 8]);
    let parts = [
        libc::iovec {
            iov_base: first.as_mut_ptr().cast(),
            iov_len: 2,
        },
        libc::iovec {
            iov_base: second.as_mut_ptr().cast(),
            iov_len: 8,
        },
    ];

    // SAFETY: two arrays of this test's.
    let found = unsafe { readv(far.as_raw_fd(), &parts) };

    assert_eq!(found, Ok(6));
    assert_eq!((&first, &second[..4]), (b"ab", &b"cdef"[..]));
}

#[test]
fn a_bell_that_was_rung_is_readable() {
    // SAFETY: gives a new descriptor, which is nobody else's.
    let bell = unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_NONBLOCK)) };
    assert!(!is_readable(bell.as_raw_fd()));

    ring_bell(bell.as_raw_fd());
    ring_bell(bell.as_raw_fd());

    let mut count = [0; 8];
    assert_eq!(read(bell.as_raw_fd(), &mut count), Ok(8));
    assert_eq!(u64::from_ne_bytes(count), 2);
}

#[test]
fn a_wait_for_room_ends_with_its_time_or_with_room() {
    let (near, _) = pair("127.0.0.1:0");
    assert!(wait_writable(near.as_raw_fd(), 1000));
    // SAFETY: gives a new descriptor, which is nobody else's; full from the beginning.
    let full = unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, libc::EFD_NONBLOCK)) };
    assert_eq!(
        write(full.as_raw_fd(), &(u64::MAX - 1).to_ne_bytes()),
        Ok(8)
    );
    let begun = Instant::now();

    assert!(!wait_writable(full.as_raw_fd(), 10));

    let passed = begun.elapsed();
    assert!(passed >= Duration::from_millis(10) && passed < Duration::from_secs(5));
}
