//! What made the samples beside it, with the sigstore crate 0.15.0 (features = ["cosign"]):
//!
//!     make DIGEST > signatures.json
//!
//! Keys are new each time, and their private halves are not kept.

use sigstore::cosign::SignatureLayer;
use sigstore::cosign::constraint::{Constraint, PrivateKeySigner};
use sigstore::crypto::SigningScheme;
use sigstore::registry::OciReference;
use std::str::FromStr;

fn main() {
    let digest = std::env::args().nth(1).expect("the image's digest");
    let another = format!("sha256:{}", "1".repeat(64));
    let mut all = Vec::new();
    for (kind, scheme) in [("p256", SigningScheme::ECDSA_P256_SHA256_ASN1), ("ed25519", SigningScheme::ED25519)] {
        let keys = scheme.create_signer().expect("a key").to_sigstore_keypair().expect("a pair");
        let public = keys.public_key_to_pem().expect("PEM");
        let mut signatures = Vec::new();
        for (case, reference, digest) in [
            ("good", "plant.example/app", &digest),
            ("another image", "plant.example/app", &another),
            ("another name", "elsewhere.example/app", &digest),
        ] {
            let reference = OciReference::from_str(reference).expect("a reference");
            let mut layer = SignatureLayer::new_unsigned(&reference, digest).expect("a payload");
            let signer = keys.to_sigstore_signer(&scheme).expect("a signer");
            PrivateKeySigner::new_with_signer(signer).add_constraint(&mut layer).expect("signs");
            signatures.push(serde_json::json!({
                "case": case,
                "payload": String::from_utf8(layer.raw_data).expect("JSON"),
                "signature": layer.signature.expect("signed"),
            }));
        }
        all.push(serde_json::json!({"kind": kind, "public_key": public, "signatures": signatures}));
    }
    println!("{}", serde_json::to_string_pretty(&all).expect("serialises"));
}
