//! Authentic packets of a tunnel are judged by the tables, joined if they are one flow's, and published; as
//! `nebula_mp.datapath.delivery`, but opened packet by packet where the payload of a superpacket belongs.
