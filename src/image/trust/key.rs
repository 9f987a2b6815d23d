//! A public key: PEM with a SubjectPublicKeyInfo (RFC 5280 §4.1), as `cosign generate-key-pair`
//! and `openssl pkey -pubout` write it. ECDSA on P-256 and Ed25519, which cosign's keys are.

use crate::model::Digest;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::signature::{ECDSA_P256_SHA256_ASN1, ED25519, UnparsedPublicKey};
use std::io::Read;
use std::path::{Path, PathBuf};

/// A key is 200 bytes; a file with a word of explanation above it, a few thousand.
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// The DER in front of the key itself. Both kinds have one form: RFC 5480 §2.1.1 with the named
/// curve and an uncompressed point, RFC 8410 §4.
const P256: &[u8] = &[
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86,
    0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
];
const ED: &[u8] = &[0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

pub struct Key {
    pub path: PathBuf,
    kind: Kind,
    der: Vec<u8>,
}

enum Kind {
    P256,
    Ed25519,
}

/// The file's text, if there is one.
pub fn read(path: &Path) -> Option<String> {
    let mut text = String::new();
    std::fs::File::open(path).ok()?.take(FILE_BYTES_MAX).read_to_string(&mut text).ok()?;
    Some(text)
}

impl Key {
    pub fn parse(path: &Path, text: &str) -> Result<Self, String> {
        let bad = |why: &str| format!("key {} {why}", path.display());
        let form = "is no public key in PEM form (-----BEGIN PUBLIC KEY-----)";
        let (_, rest) = text.split_once("-----BEGIN PUBLIC KEY-----").ok_or_else(|| bad(form))?;
        let (body, _) = rest.split_once("-----END PUBLIC KEY-----").ok_or_else(|| bad(form))?;
        let body: String = body.split_ascii_whitespace().collect();
        let der = STANDARD.decode(body).map_err(|_| bad(form))?;
        let kind = match (der.strip_prefix(P256), der.strip_prefix(ED)) {
            // 4: the point is not compressed.
            (Some(point), _) if point.len() == 65 && point[0] == 4 => Kind::P256,
            (_, Some(key)) if key.len() == 32 => Kind::Ed25519,
            _ => return Err(bad("is neither ECDSA on P-256 nor Ed25519, which neap verifies")),
        };
        Ok(Self { path: path.to_owned(), kind, der })
    }

    pub fn fingerprint(&self) -> Digest {
        Digest::from_sha256(ring::digest::digest(&ring::digest::SHA256, &self.der).as_ref())
    }

    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        match self.kind {
            Kind::P256 => {
                let key = UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &self.der[P256.len()..]);
                key.verify(message, signature).is_ok()
            }
            Kind::Ed25519 => {
                UnparsedPublicKey::new(&ED25519, &self.der[ED.len()..]).verify(message, signature).is_ok()
            }
        }
    }
}
