//! The functions without memory: for the kernel's `checksum`, and for tests that compare them with Python's.

use nebula_mp_core::aead::{Cipher, Key};
use nebula_mp_core::coalesce::{Run, JOINT_HEADERS_MAX};
use nebula_mp_core::header::{HEADER_BYTES, TAG_BYTES};
use nebula_mp_core::ip::FlowKey;
use nebula_mp_core::segment::{self, Cut};
use nebula_mp_core::virtio::{self, Gso, VirtioHeader, PLAIN};
use nebula_mp_core::{checksum, flows, ip, layout};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// Make them known to the module.
pub fn add_functions(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(internet_checksum, module)?)?;
    module.add_function(wrap_pyfunction!(segment_packet, module)?)?;
    module.add_function(wrap_pyfunction!(coalesce, module)?)?;
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
    if header.gso == Gso::None {
        let mut single = packet.to_vec();
        segment::complete(&header, &mut single);
        return Some(vec![PyBytes::new(py, &single)]);
    }
    let cut = Cut::new(&header, packet, packet.len())?;
    let stride = cut.segment_bytes;
    let mut out = vec![0; cut.count * stride];
    cut.place(packet, &mut out, stride, 0, cut.count);
    cut.stamp(&mut out, stride, 0, cut.count);
    let parts = out.chunks(stride).enumerate();
    Some(
        parts
            .map(|(number, part)| PyBytes::new(py, &part[..cut.segment_size(number)]))
            .collect(),
    )
}

/// What a device gets for these packets, with the header in front, and how many packets each stands for.
#[pyfunction]
fn coalesce(
    py: Python<'_>,
    packets: Vec<Vec<u8>>,
    tso: bool,
    uso: bool,
) -> Vec<(Bound<'_, PyBytes>, usize)> {
    let takes = |run: &Run| match run.shape.gso {
        Gso::Tcp4 | Gso::Tcp6 => tso,
        Gso::Udp => uso,
        Gso::None => false,
    };
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(first) = packets.get(at) {
        let Some(mut run) = Run::begin(first).filter(takes) else {
            found.push((PyBytes::new(py, &[&PLAIN[..], first].concat()), 1));
            at += 1;
            continue;
        };
        let headers = run.shape.header_bytes;
        let mut payload = first[headers..].to_vec();
        at += 1;
        while let Some(next) = packets.get(at).filter(|next| run.try_add(next)) {
            payload.extend_from_slice(&next[headers..]);
            at += 1;
        }
        let mut head = [0; virtio::HEADER_BYTES + JOINT_HEADERS_MAX];
        let begin = head.len() - run.write_head(&mut head);
        let joint = [&head[begin..], &payload].concat();
        found.push((PyBytes::new(py, &joint), run.packets));
    }
    found
}

/// `shm_flows.pack_key` of `wire.ip.parse_flow`; None for what that refuses.
#[pyfunction]
fn parse_flow<'py>(py: Python<'py>, packet: &[u8], inbound: bool) -> Option<Bound<'py, PyBytes>> {
    let FlowKey(words) = ip::parse_flow(packet, inbound).ok()?;
    let packed = words.map(u64::to_le_bytes).concat();
    Some(PyBytes::new(py, &packed))
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
