//! Rings to TUN and UDP: every fault of every call, and that an area is released only behind its last call.
#![cfg(not(any(miri, loom)))]

#[path = "../common/packets.rs"]
mod packets;
mod tun;
mod udp;
mod world;
