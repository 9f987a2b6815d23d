//! Tells the program when it was built: no clock that says less is right. SOURCE_DATE_EPOCH
//! makes the same build twice (reproducible-builds.org); builds that set it to zero, for the
//! C compiler's sake, get the time at which this source was there.

/// 2026-11-01.
const SOURCE_WRITTEN_SECONDS: u64 = 1_793_491_200;

fn main() {
    println!("cargo:rerun-if-changed=cross/built.rs");
    println!("cargo:rerun-if-env-changed=SOURCE_DATE_EPOCH");
    let given = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|text| text.parse::<u64>().ok());
    let now =
        || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    println!("cargo:rustc-env=NEAP_BUILT_SECONDS={}", given.unwrap_or_else(now).max(SOURCE_WRITTEN_SECONDS));
}
