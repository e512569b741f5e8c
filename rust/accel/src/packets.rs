//! The functions without memory: for the kernel's `checksum`, and for tests that compare them with Python's.

use nebula_mp_core::aead::{Cipher, Key};
use nebula_mp_core::header::{HEADER_BYTES, TAG_BYTES};
use nebula_mp_core::ip::FlowKey;
use nebula_mp_core::virtio::{self, VirtioHeader};
use nebula_mp_core::{checksum, coalesce, flows, ip, layout, segment};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// Make them known to the module.
pub fn add_functions(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(internet_checksum, module)?)?;
    module.add_function(wrap_pyfunction!(segment_packet, module)?)?;
    module.add_function(wrap_pyfunction!(coalesce_packets, module)?)?;
    module.add_function(wrap_pyfunction!(parse_flow, module)?)?;
    module.add_function(wrap_pyfunction!(flow_hash, module)?)?;
    module.add_function(wrap_pyfunction!(seal, module)?)?;
    module.add_function(wrap_pyfunction!(open, module)?)?;
    module.add_function(wrap_pyfunction!(layouts, module)?)?;
    module.add_function(wrap_pyfunction!(layout_offsets, module)?)
}

/// `wire.ip.internet_checksum`.
#[pyfunction]
#[pyo3(name = "checksum")]
fn internet_checksum(py: Python<'_>, data: PyBuffer<u8>) -> PyResult<u16> {
    Ok(checksum::internet_checksum(&data.to_vec(py)?))
}

/// `datapath.segment.segment`, of a packet with its header; None for what `VirtioHeader.parse` refuses.
#[pyfunction]
#[pyo3(name = "segment")]
fn segment_packet<'py>(
    py: Python<'py>,
    vnet: [u8; virtio::HEADER_BYTES],
    packet: &[u8],
) -> Option<Vec<Bound<'py, PyBytes>>> {
    let header = VirtioHeader::parse(&vnet, packet, packet.len()).ok()?;
    let parts = segment::segment(&header, packet)?;
    Some(parts.iter().map(|part| PyBytes::new(py, part)).collect())
}

/// What a device gets for these packets, with the header in front, and how many packets each stands for.
#[pyfunction]
#[pyo3(name = "coalesce")]
fn coalesce_packets(
    py: Python<'_>,
    packets: Vec<Vec<u8>>,
    tso: bool,
    uso: bool,
) -> Vec<(Bound<'_, PyBytes>, usize)> {
    let packets: Vec<&[u8]> = packets.iter().map(Vec::as_slice).collect();
    coalesce::coalesce(&packets, tso, uso)
        .into_iter()
        .map(|(count, whole)| (PyBytes::new(py, &whole), count))
        .collect()
}

/// `shm_flows.pack_key` of `wire.ip.parse_flow`; None for what that refuses.
#[pyfunction]
fn parse_flow<'py>(py: Python<'py>, packet: &[u8], inbound: bool) -> Option<Bound<'py, PyBytes>> {
    let flow = ip::parse_flow(packet, inbound).ok()?;
    Some(PyBytes::new(py, &flow.to_bytes()))
}

/// `shm_flows.flow_hash`.
#[pyfunction]
fn flow_hash(seeds: [u64; 6], key: [u8; 40]) -> u64 {
    let mut words = [0; 5];
    for (word, bytes) in words.iter_mut().zip(key.chunks_exact(8)) {
        *word = bytes
            .iter()
            .rev()
            .fold(0, |value, &byte| value << 8 | u64::from(byte));
    }
    flows::flow_hash(&seeds, &FlowKey(words))
}

/// `cipher` is the tunnel table's code.
fn key(cipher: u8, key: [u8; 32]) -> PyResult<Key> {
    match cipher {
        1 => Ok(Key::new(Cipher::Aes, &key)),
        2 => Ok(Key::new(Cipher::ChaCha, &key)),
        _ => Err(PyValueError::new_err("cipher: 1 or 2")),
    }
}

/// `crypto.aead.Aead.seal`.
#[pyfunction]
#[pyo3(name = "seal")]
fn seal<'py>(
    py: Python<'py>,
    cipher: u8,
    secret: [u8; 32],
    counter: u64,
    header: [u8; HEADER_BYTES],
    plaintext: &[u8],
) -> PyResult<Bound<'py, PyBytes>> {
    let mut data = plaintext.to_vec();
    data.resize(plaintext.len() + TAG_BYTES, 0);
    key(cipher, secret)?.seal_in_place(counter, &header, &mut data);
    Ok(PyBytes::new(py, &data))
}

/// What `crypto.aead.Aead.open_into` leaves, and whether it was authentic.
#[pyfunction]
#[pyo3(name = "open")]
fn open<'py>(
    py: Python<'py>,
    cipher: u8,
    secret: [u8; 32],
    counter: u64,
    header: [u8; HEADER_BYTES],
    sealed: &[u8],
) -> PyResult<(bool, Bound<'py, PyBytes>)> {
    let Some(size) = sealed.len().checked_sub(TAG_BYTES) else {
        return Err(PyValueError::new_err("shorter than its tag"));
    };
    let mut out = vec![0xA5; size];
    let opened = key(cipher, secret)?.open_separate(counter, &header, sealed, &mut out);
    Ok((opened.is_ok(), PyBytes::new(py, &out)))
}

/// Name, offset and size of everything in shared memory.
#[pyfunction]
fn layout_offsets() -> Vec<(String, usize, usize)> {
    layout::offsets()
}

/// Name, magic and version of each kind of region.
#[pyfunction]
fn layouts(py: Python<'_>) -> Vec<(&str, Bound<'_, PyBytes>, u32)> {
    layout::LAYOUTS
        .iter()
        .map(|each| (each.name, PyBytes::new(py, each.magic), each.version))
        .collect()
}
