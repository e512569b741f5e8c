//! The pure modules behind their public functions, against packets that `packets` makes without them.

#[path = "../common/packets.rs"]
mod packets;

mod coalesce;
mod ip;
mod plans;
mod segment;
mod virtio;
