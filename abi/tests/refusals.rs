//! What a guest says of each kind of bad ROM, and that it says where.

use vmi_abi::REVISION_3_0;
use vmi_abi::probe::{Refusal, license, probe, scan};

/// The least that a guest takes.
fn good() -> Vec<u8> {
    let mut image = vec![0; 512];
    image[..3].copy_from_slice(&[0x55, 0xaa, 1]);
    image[8..14].copy_from_slice(b"cVmi\0\x03");
    image[22] = 0xd0;
    image[24] = 0x90;
    image[0x90..0x94].copy_from_slice(b"PCIR");
    image[0xd0..0xd4].copy_from_slice(b"GPL\0");
    image
}

#[test]
fn every_refusal_names_its_place() {
    assert!(probe(&good(), REVISION_3_0).is_ok());
    let changes: [(usize, u8, Refusal, &str); 9] = [
        (0, 0x54, Refusal::NoRomSignature, "55 AA at offset 0"),
        (11, b'I', Refusal::NoVmiSignature, "`cVmi` at offset 8"),
        (13, 13, Refusal::Revision(vmi_abi::Revision { major: 13, minor: 0 }), "13.0 at offset 12"),
        (2, 2, Refusal::Length { claimed: 1024, present: 512 }, "offset 2 claims 1024 bytes, 512"),
        (2, 0, Refusal::Length { claimed: 0, present: 512 }, "offset 2 claims 0 bytes"),
        (25, 0xff, Refusal::NoPciHeader, "PCIR structure where offset 24"),
        (0x90, b'p', Refusal::NoPciHeader, "PCIR structure where offset 24"),
        (22, 0, Refusal::NoLicense, "licence string where offset 22"),
        (0xd0, b'L', Refusal::License, "`GPL` nor `GPL v2`"),
    ];
    for (at, value, wanted, words) in changes {
        let mut image = good();
        image[at] = value;
        let refusal = probe(&image, REVISION_3_0).expect_err(words);
        assert_eq!(refusal, wanted);
        assert!(refusal.to_string().contains(words), "{refusal}");
        assert_eq!(scan(&image, REVISION_3_0), None);
    }
    let short = probe(&good()[..100], REVISION_3_0).expect_err("no header");
    assert_eq!(short.to_string(), "fewer bytes than a ROM header has");
    let mut endless = good();
    endless[0xd3..].fill(b'x');
    assert_eq!(probe(&endless, REVISION_3_0), Err(Refusal::NoLicense));
    assert_eq!(license(&good()), Some(&b"GPL"[..]));
}
