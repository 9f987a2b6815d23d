//! Laws of unpacking, over small layers made here: odd ones, hostile ones, broken ones.
//!
//! They make device nodes and set owners, so they need root; without it each says so and passes.

use super::check::Written;
use super::job::{Job, Source};
use super::limits::{Budget, Limits, MIB};
use super::store::Directory;
use super::tarball::TarReader;
use super::tree::{Below, OPAQUE};
use super::unpack::{Unpacked, unpack};
use super::worker::{Place, import};
use super::{ImageError, platform::Machine};
use proptest::prelude::*;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

#[test]
fn hostile_entries_are_refused_by_name() {
    let trusted: &[(&str, &[u8])] = &[("SCHILY.xattr.trusted.overlay.opaque", b"y")];
    let overlay: &[(&str, &[u8])] = &[("SCHILY.xattr.user.overlay.redirect", b"/etc")];
    let deep = "d/".repeat(300);
    let cases: Vec<(&str, Layer, &str)> = vec![
        ("absolute", Layer::new().file("/etc/passwd", "x"), "`/etc/passwd` is absolute"),
        ("upwards", Layer::new().file("a/../../x", "x"), "leads upwards"),
        ("only dots", Layer::new().directory(".."), "leads upwards"),
        (
            "through a symlink",
            Layer::new().symlink("s", "/etc").file("s/x", "x"),
            "`s/x` would be written through the symlink `s`",
        ),
        (
            "through a symlink, deep",
            Layer::new().symlink("a/s", ".").file("a/s/b/x", "x"),
            "the symlink `a/s`",
        ),
        (
            "a directory's children through its replacement",
            Layer::new().directory("d").symlink("d", "/tmp").file("d/x", "x"),
            "through the symlink `d`",
        ),
        ("below a file", Layer::new().file("f", "x").file("f/x", "x"), "lies below `f`"),
        ("link outside", Layer::new().link("l", "../../etc/shadow"), "hard link to outside"),
        ("absolute link", Layer::new().link("l", "/etc/shadow"), "hard link to outside"),
        ("link through a symlink", Layer::new().symlink("s", "/etc").link("l", "s/shadow"), "not there"),
        ("link to nothing", Layer::new().link("l", "nothing"), "`nothing`, which is not there"),
        ("link to a directory", Layer::new().directory("d").link("l", "d"), "a directory"),
        ("link to the root", Layer::new().link("l", "."), "a directory"),
        ("link to itself", Layer::new().file("l", "x").link("l", "l"), "to itself"),
        (
            "link to what it replaces",
            Layer::new().directory("d").file("d/f", "x").link("d", "d/f"),
            "not there",
        ),
        ("link to a whiteout", Layer::new().file(".wh.w", "").link("l", "w"), "not there"),
        ("trusted xattr", Layer::new().pax(trusted).directory("d"), "xattr `trusted.overlay.opaque`"),
        ("overlay's user xattr", Layer::new().pax(overlay).file("f", ""), "xattr `user.overlay.redirect`"),
        ("whiteout of nothing", Layer::new().file("d/.wh.", ""), "whiteout of nothing"),
        ("whiteout of the parent", Layer::new().file("d/.wh...", ""), "whiteout of nothing"),
        ("below a whiteout's name", Layer::new().file(".wh.d/x", ""), "below a whiteout's name"),
        ("root as a file", Layer::new().file("./", "x"), "stands for the root"),
        ("root as a symlink", Layer::new().symlink(".", "/"), "stands for the root"),
        ("empty symlink", Layer::new().symlink("s", ""), "can't be"),
        ("NUL in a name", Layer::new().pax(&[("path", b"a\0b")]).file("x", ""), "NUL"),
        ("too long", Layer::new().pax(&[("path", &b"a/".repeat(2500))]).file("x", ""), "longer than 4,095"),
        ("too deep", Layer::new().pax(&[("path", deep.as_bytes())]).file("x", ""), "256 directories deep"),
        ("name too long", Layer::new().pax(&[("path", &[b'n'; 256])]).file("x", ""), "longer than 255"),
        ("unknown type", Layer::new().raw(b'Z', "z", "", &[]), "is of type `Z`"),
        ("volume label", Layer::new().raw(b'V', "v", "", &[]), "is of type `V`"),
        ("id too large", Layer::new().pax(&[("uid", b"4294967295")]).file("f", ""), "uid 4294967295"),
        (
            "size too large",
            Layer::new().pax(&[("size", b"18446744073709551615")]).file("f", ""),
            "larger than",
        ),
        ("bad pax", Layer::new().raw(b'x', "x", "", b"99 path=a\n").file("f", ""), "malformed"),
        ("pax of nothing", Layer::new().raw(b'x', "x", "", b"10 path=ab\n"), "malformed"),
        ("global rename", Layer::new().raw(b'g', "g", "", b"10 path=a\n").file("f", ""), "global"),
        (
            "overlapping sparse map",
            Layer::new().pax(&[("GNU.sparse.map", b"0,2,1,2"), ("GNU.sparse.size", b"9")]).file("f", "abcd"),
            "overlap",
        ),
        (
            "sparse map beyond its end",
            Layer::new().pax(&[("GNU.sparse.map", b"8,4"), ("GNU.sparse.size", b"9")]).file("f", "abcd"),
            "beyond its end",
        ),
        (
            "sparse map of other data",
            Layer::new().pax(&[("GNU.sparse.map", b"0,3"), ("GNU.sparse.size", b"9")]).file("f", "abcd"),
            "differ in size",
        ),
        (
            "unknown sparse format",
            Layer::new().pax(&[("GNU.sparse.major", b"2"), ("GNU.sparse.minor", b"0")]).file("f", "abcd"),
            "not known",
        ),
    ];
    for (what, layer, expected) in cases {
        let Some(root) = Root::new() else { return };

        let error = root.unpack(&layer.bytes(), &[]).expect_err(what).to_string();

        assert!(error.contains(expected), "{what}: {error}");
    }
}

#[test]
fn metadata_is_kept_as_the_archive_has_it() {
    let Some(root) = Root::new() else { return };
    // vfs_cap_data revision 2: cap_net_bind_service, permitted and effective; a newline among them.
    let capability: &[u8] = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let layer = Layer::new()
        .with(0o1777, 1, 2, 1_000_000_000)
        .directory("tmp")
        .with(0o4755, 1000, 70_000, 1_234_567_890)
        .pax(&[("mtime", b"1234567890.123456789"), ("SCHILY.xattr.security.capability", capability)])
        .file("tmp/tool", "tool")
        .pax(&[("path", b"tmp/new\nline\xff"), ("SCHILY.xattr.user.note", b"a\nb"), ("mtime", b"-1.5")])
        .file("x", "data")
        .symlink("absolute", "/etc/../x")
        .symlink("up", "../../../up")
        .raw(b'6', "fifo", "", &[])
        .link("tmp/hard", "tmp/tool");

    let unpacked = root.unpack(&layer.bytes(), &[]).expect("unpacks");

    assert_eq!((unpacked.bytes, unpacked.leans), (8, false));
    let tool = root.stat("tmp/tool");
    assert_eq!((tool.mode() & 0o7777, tool.uid(), tool.gid(), tool.nlink()), (0o4755, 1000, 70_000, 2));
    assert_eq!((tool.mtime(), tool.mtime_nsec()), (1_234_567_890, 123_456_789));
    assert_eq!(root.xattr("tmp/tool", "security.capability").as_deref(), Some(capability));
    let odd = root.path().join(OsStr::from_bytes(b"tmp/new\nline\xff"));
    assert_eq!(fs::read(&odd).expect("there"), b"data");
    let odd = fs::metadata(&odd).expect("there");
    assert_eq!((odd.mtime(), odd.mtime_nsec()), (-2, 500_000_000));
    let tmp = root.stat("tmp");
    assert_eq!((tmp.mode() & 0o7777, tmp.uid(), tmp.gid(), tmp.mtime()), (0o1777, 1, 2, 1_000_000_000));
    assert_eq!(root.target("absolute"), Path::new("/etc/../x"));
    assert_eq!(root.target("up"), Path::new("../../../up"));
    let fifo = root.stat("fifo");
    assert!(fifo.file_type().is_fifo() && fifo.mode() & 0o7777 == 0o4755 && fifo.mtime() == 1_234_567_890);
}

#[test]
fn whiteouts_hide_what_is_below_and_nothing_of_their_own_layer() {
    let entries: [(&str, &str); 5] =
        [("d/.wh..wh..opq", ""), ("d/own", "x"), (".wh.file", ""), ("file", "x"), ("d/.wh.gone", "")];
    // In whichever order they come.
    for turn in 0..entries.len() {
        let Some(root) = Root::new() else { return };
        let mut layer = Layer::new().directory("d").file(".wh.lone", "").file(".wh.again/", "");
        for at in 0..entries.len() {
            let (name, data) = entries[(at + turn) % entries.len()];
            layer = layer.file(name, data);
        }
        // A directory that comes after its whiteout is a new one.
        let layer =
            layer.file(".wh.fresh", "").file("fresh/new", "x").directory("early").file(".wh.early", "");

        root.unpack(&layer.bytes(), &[]).expect("unpacks");

        assert!(root.is_whiteout("lone"));
        assert!(root.stat("file").is_file() && root.stat("d/own").is_file());
        assert!(!root.path().join("d/gone").exists(), "below an opaque directory there is nothing to hide");
        for opaque in ["d", "fresh", "early"] {
            assert_eq!(root.xattr(opaque, OPAQUE).as_deref(), Some(&b"y"[..]), "{opaque}");
        }
        let names: Vec<_> =
            fs::read_dir(root.path()).expect("there").flatten().map(|e| e.file_name()).collect();
        assert!(names.iter().all(|name| !name.as_bytes().starts_with(b".wh.")), "{names:?}");
    }
}

/// umoci writes both for a directory that became a file; others list what was in a removed one.
#[test]
fn whiteouts_below_what_is_gone_bring_nothing_back() {
    let entries = [
        ("was/.wh.child", ""),
        ("was", "file"),
        ("gone/.wh.child", ""),
        (".wh.gone", ""),
        ("gone/.wh..wh..opq", ""),
    ];
    for turn in 0..entries.len() {
        let Some(root) = Root::new() else { return };
        let turned = (0..entries.len()).map(|at| entries[(at + turn) % entries.len()]);
        let layer =
            turned.fold(Layer::new().symlink("s", "/etc"), |layer, (name, data)| layer.file(name, data));
        let layer = layer.file("s/.wh.passwd", "").file("new/.wh.hidden", "");

        root.unpack(&layer.bytes(), &[]).expect("unpacks");

        assert_eq!(root.read("was"), "file");
        assert!(root.is_whiteout("gone") && root.is_whiteout("new/hidden"));
        assert!(Path::new("/etc/passwd").is_file() && root.target("s") == Path::new("/etc"));
    }
}

#[test]
fn opaque_root_hides_each_name_below() {
    let (Some(lower), Some(upper)) = (Root::new(), Root::new()) else { return };
    lower
        .unpack(&Layer::new().file("a", "x").directory("both").file("kept", "x").bytes(), &[])
        .expect("unpacks");
    let layer = Layer::new().directory("both").file("kept", "y").file(".wh..wh..opq", "");

    let unpacked = upper.unpack(&layer.bytes(), &[&lower]).expect("unpacks");

    assert!(unpacked.leans && upper.is_whiteout("a") && upper.stat("kept").is_file());
    assert_eq!(upper.xattr("both", OPAQUE).as_deref(), Some(&b"y"[..]));
}

#[test]
fn later_entries_replace_earlier_ones_as_docker_does() {
    let Some(root) = Root::new() else { return };
    let layer = Layer::new()
        .file("a", "first")
        .file("a", "second")
        .directory("d")
        .file("d/kept", "x")
        .with(0o700, 0, 0, 7)
        .directory("d")
        .directory("was/dir")
        .file("was/dir/x", "x")
        .file("was/dir", "file")
        .file("was/file", "x")
        .directory("was/file")
        .file("was/file/in", "x")
        .symlink("s", "/etc")
        .directory("s")
        .file("s/in", "x");

    root.unpack(&layer.bytes(), &[]).expect("unpacks");

    assert_eq!(root.read("a"), "second");
    assert!(root.stat("d/kept").is_file() && root.stat("d").mode() & 0o777 == 0o700);
    assert_eq!(root.read("was/dir"), "file");
    assert!(root.stat("was/file/in").is_file() && root.stat("s/in").is_file() && root.stat("s").is_dir());
}

#[test]
fn devices_are_left_out_with_a_warning_and_so_are_links_to_them() {
    let Some(root) = Root::new() else { return };
    let layer = Layer::new()
        .raw(b'3', "dev/null", "", &[])
        .raw(b'4', "dev/sda", "", &[])
        .link("dev/zero", "dev/null");

    let mut warnings = Vec::new();
    root.unpack_with(&layer.file("f", "").bytes(), &[], Limits::default(), &mut warnings).expect("unpacks");

    assert_eq!(warnings.len(), 3, "{warnings:?}");
    assert!(warnings[0].contains("`dev/null` left out: a device node"), "{warnings:?}");
    assert!(!root.path().join("dev").exists() && root.stat("f").is_file());
}

#[test]
fn warnings_are_counted_beyond_twenty() {
    let Some(root) = Root::new() else { return };
    let layer = (0..50).fold(Layer::new(), |layer, n| layer.raw(b'3', &format!("dev/{n}"), "", &[]));

    let mut warnings = Vec::new();
    root.unpack_with(&layer.bytes(), &[], Limits::default(), &mut warnings).expect("unpacks");

    assert_eq!(warnings.len(), 21);
    assert_eq!(warnings[20], "and 30 more");
}

#[test]
fn directory_without_an_entry_is_the_one_below() {
    let (Some(lower), Some(upper), Some(alone)) = (Root::new(), Root::new(), Root::new()) else { return };
    let below = Layer::new().with(0o1777, 5, 6, 77).directory("tmp").directory("tmp/sub");
    lower.unpack(&below.bytes(), &[]).expect("unpacks");
    let layer = Layer::new().file("tmp/sub/f", "x").file("new/f", "x").bytes();

    let over = upper.unpack(&layer, &[&lower]).expect("unpacks");
    let first = alone.unpack(&layer, &[]).expect("unpacks");

    assert!(over.leans && first.leans);
    let tmp = upper.stat("tmp");
    assert_eq!((tmp.mode() & 0o7777, tmp.uid(), tmp.gid(), tmp.mtime()), (0o1777, 5, 6, 77));
    for new in [upper.stat("new"), alone.stat("tmp")] {
        assert_eq!((new.mode() & 0o7777, new.uid(), new.gid(), new.mtime()), (0o755, 0, 0, 0));
    }
}

#[test]
fn writing_through_a_symlink_of_a_layer_below_is_refused() {
    let (Some(lower), Some(upper)) = (Root::new(), Root::new()) else { return };
    lower.unpack(&Layer::new().directory("usr/bin").symlink("bin", "usr/bin").bytes(), &[]).expect("unpacks");

    let error =
        upper.unpack(&Layer::new().file("bin/sh", "x").bytes(), &[&lower]).expect_err("refused").to_string();

    assert!(error.contains("below `bin`") && error.contains("symlink of a layer below"), "{error}");
}

#[test]
fn hard_link_to_a_layer_below_copies_the_file_up() {
    let (Some(bottom), Some(middle), Some(top)) = (Root::new(), Root::new(), Root::new()) else { return };
    let below =
        Layer::new().with(0o4750, 3, 4, 99).file("bin/tool", "tool").file("gone", "x").symlink("ln", "to");
    bottom.unpack(&below.bytes(), &[]).expect("unpacks");
    middle.unpack(&Layer::new().file(".wh.gone", "").bytes(), &[&bottom]).expect("unpacks");
    let both = [&bottom, &middle];

    let unpacked = top
        .unpack(&Layer::new().link("hard", "bin/tool").link("soft", "ln").bytes(), &both)
        .expect("unpacks");
    let hidden = Root::new().expect("root").unpack(&Layer::new().link("l", "gone").bytes(), &both);

    assert!(unpacked.leans);
    let (hard, tool) = (top.stat("hard"), top.stat("bin/tool"));
    assert_eq!((hard.ino(), hard.nlink()), (tool.ino(), 2));
    assert_eq!((hard.mode() & 0o7777, hard.uid(), hard.gid(), hard.mtime()), (0o4750, 3, 4, 99));
    assert_eq!(top.read("hard"), "tool");
    assert_eq!(top.target("soft"), Path::new("to"));
    assert!(hidden.expect_err("hidden by the middle layer").to_string().contains("not there"));
}

/// The sums taken while files were written, against those of the files as they are.
#[test]
fn seal_taken_while_unpacking_is_that_of_a_later_read() {
    let (Some(bottom), Some(top)) = (Root::new(), Root::new()) else { return };
    bottom.unpack(&Layer::new().file("bin/tool", "tool").bytes(), &[]).expect("unpacks");
    let layer = Layer::new()
        .file("replaced", "first")
        .link("kept", "replaced")
        .file("replaced", "second, and longer")
        .file("gone", "a file")
        .directory("gone")
        .file("shrunk", &"x".repeat(300_000))
        .file("shrunk", "")
        .link("hard", "bin/tool")
        .pax(&[("GNU.sparse.map", b"100000,2,200000,2"), ("GNU.sparse.size", b"300000")])
        .file("sparse", "abcd");

    let unpacked = top.unpack(&layer.bytes(), &[&bottom]).expect("unpacks");

    assert_eq!(top.read("kept"), "first");
    assert_eq!(top.stat("sparse").len(), 300_000);
    let seal = |written: &Written| super::check::seal(top.path(), written).expect("read");
    assert_eq!(seal(&unpacked.written), seal(&Written::default()));
}

#[test]
fn sparse_files_of_each_format_have_their_holes_and_data() {
    for format in [
        "--format=gnu",
        "--format=pax --sparse-version=0.0",
        "--format=pax --sparse-version=0.1",
        "--format=pax --sparse-version=1.0",
    ] {
        let (Some(source), Some(root)) = (Root::new(), Root::new()) else { return };
        // More pieces than the four that fit into an old GNU header, and a hole at the end.
        let script = "for i in $(seq 1 30); do printf \"piece $i\" | dd of=sparse bs=1 seek=$((i * 100000)) conv=notrunc status=none; done; truncate -s 4000000 sparse; cp sparse plain; tar --sparse $FORMAT -cf - sparse plain";
        let mut command = std::process::Command::new("sh");
        let output = command
            .args(["-c", script])
            .env("FORMAT", format)
            .current_dir(source.path())
            .output()
            .expect("runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

        let unpacked = root.unpack(&output.stdout, &[]).expect(format);

        assert!(output.stdout.len() < 1_000_000, "{format}: tar found the holes");
        assert_eq!(unpacked.bytes, 8_000_000);
        let same = fs::read(root.path().join("sparse")).expect("there")
            == fs::read(source.path().join("sparse")).expect("there");
        assert!(same, "{format}");
        assert!(root.stat("sparse").blocks() * 512 < 1_000_000, "{format}");
    }
}

#[test]
fn bounds_of_an_image_are_refused_by_name() {
    let many = (0..20).fold(Layer::new(), |layer, n| layer.file(&n.to_string(), "")).bytes();
    let implied = Layer::new().file("a/b/c/d/e/f/g/h/i/j/k/l/m", "").bytes();
    let large = Layer::new()
        .pax(&[("GNU.sparse.map", b"0,1"), ("GNU.sparse.size", b"99999999")])
        .file("hole", "x")
        .bytes();
    let small = Limits { entries: 10, unpacked_bytes: MIB, ..Limits::default() };
    let full = Limits { disk_reserve: u64::MAX, ..Limits::default() };
    for (layer, limits, expected) in [
        (&many, &small, "more than 10 files"),
        (&implied, &small, "more than 10 files"),
        (&large, &small, "larger than 1 MiB"),
        (&many, &full, "kept for events"),
    ] {
        let Some(root) = Root::new() else { return };

        let error =
            root.unpack_with(layer, &[], limits.clone(), &mut Vec::new()).expect_err(expected).to_string();

        assert!(error.contains(expected), "{error}");
    }
}

/// Every cut and many flipped bits: an answer, no panic, and nothing in the store.
#[test]
fn broken_archives_never_panic_and_never_stay() {
    let Some(root) = Root::new() else { return };
    let good = Archive::of(
        &Layer::new().pax(&[("mtime", b"1.5")]).directory("d").file("d/f", "data").link("l", "d/f"),
    );
    let store = Store::new(root.path());
    assert!(store.import(&good, Limits::default()).is_ok());

    for cut in (0..good.len()).step_by(97) {
        let result = store.import(&good[..cut], Limits::default());
        // Behind the last blob there is only padding.
        assert!(result.is_err() || cut > good.len() - 1536, "{cut} of {}", good.len());
    }
    let mut seed = 1_u32;
    for _ in 0..400 {
        let mut bad = good.clone();
        for _ in 0..2 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let at = seed as usize % bad.len();
            bad[at] ^= 1 << (seed >> 29);
        }
        let _ = store.import(&bad, Limits::default());
    }
}

#[test]
fn archive_bounds_are_refused_by_name() {
    let Some(root) = Root::new() else { return };
    let good = Archive::of(&Layer::new().file("f", "data"));
    let store = Store::new(root.path());
    for (limits, expected) in [
        (Limits { archive_bytes: 3000, ..Limits::default() }, "larger than 0 MiB"),
        (Limits { archive_entries: 2, ..Limits::default() }, "more than 2 files"),
        (Limits { json_bytes: 10, ..Limits::default() }, "at most 10 are read"),
        (Limits { ratio: 1, ratio_from: 100, ..Limits::default() }, "out of all proportion"),
    ] {
        let good = if expected.contains("proportion") {
            Archive::gzipped(&Layer::new().file("f", &"0".repeat(100_000)))
        } else {
            good.clone()
        };

        let error = store.import(&good, limits).expect_err(expected);

        assert!(error.contains(expected), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Headers with right checksums and any content otherwise.
    #[test]
    fn any_tar_stream_is_read_or_refused(
        kind in prop::sample::select(b"0123456xgLKSZ\0".to_vec()),
        noise in prop::collection::vec((0_usize..512, any::<u8>()), 0..24),
        data in prop::collection::vec(any::<u8>(), 0..1500),
        size in 0_u64..3000,
    ) {
        let mut bytes = Vec::new();
        for kind in [kind, b'0', kind] {
            let mut header = tar::Header::new_gnu();
            header.set_size(size);
            header.set_mode(0o644);
            let block = header.as_mut_bytes();
            block[0] = b'f';
            for (at, byte) in &noise {
                block[*at] = *byte;
            }
            block[156] = kind;
            header.set_cksum();
            bytes.extend_from_slice(header.as_bytes());
            bytes.extend_from_slice(&data);
            bytes.resize(bytes.len().next_multiple_of(512), 0);
        }
        let mut reader = TarReader::new(&bytes[..]);
        let mut entries = 0;
        while let Ok(Some(_)) = reader.next_entry() {
            entries += 1;
            prop_assert!(entries <= bytes.len() / 512);
        }
    }

    #[test]
    fn any_compressed_stream_is_read_or_refused(
        magic in prop::sample::select(vec![&b"\x28\xb5\x2f\xfd"[..], b"\x1f\x8b\x08\0", b"\x50\x2a\x4d\x18"]),
        rest in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        use std::io::Read;
        let bytes = [magic, &rest].concat();
        if let Ok((_, stream)) = super::decompress::decompress(&bytes[..]) {
            let _ = std::io::copy(&mut stream.take(64 * MIB), &mut std::io::sink());
        }
    }
}

/// A layer directory of its own.
struct Root(tempfile::TempDir);

impl Root {
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: owners and device nodes need root");
            return None;
        }
        Some(Self(tempfile::tempdir().expect("a directory")))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn unpack(&self, layer: &[u8], below: &[&Root]) -> Result<Unpacked, ImageError> {
        self.unpack_with(layer, below, Limits::default(), &mut Vec::new())
    }

    fn unpack_with(
        &self,
        layer: &[u8],
        layers: &[&Root],
        limits: Limits,
        warnings: &mut Vec<String>,
    ) -> Result<Unpacked, ImageError> {
        let open = |path: &Path| File::open(path).expect("there").into();
        let mut below = Below::default();
        for layer in layers {
            below.push(open(layer.path()));
        }
        let mut budget = Budget::new(limits, Some(open(self.path())));
        unpack(&mut TarReader::new(layer), open(self.path()), &below, &mut budget, &mut |text| {
            warnings.push(text)
        })
    }

    fn stat(&self, name: &str) -> fs::Metadata {
        fs::symlink_metadata(self.path().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn is_whiteout(&self, name: &str) -> bool {
        let stat = self.stat(name);
        stat.file_type().is_char_device() && stat.rdev() == 0
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path().join(name)).expect("there")
    }

    fn target(&self, name: &str) -> PathBuf {
        fs::read_link(self.path().join(name)).expect("a symlink")
    }

    fn xattr(&self, name: &str, key: &str) -> Option<Vec<u8>> {
        let mut value = vec![0; 256];
        let length = rustix::fs::getxattr(self.path().join(name), key, &mut value[..]).ok()?;
        value.truncate(length);
        Some(value)
    }
}

/// A tar, entry by entry; nothing about it is checked.
#[derive(Clone)]
struct Layer {
    bytes: Vec<u8>,
    attributes: (u32, u64, u64, u64),
}

impl Layer {
    fn new() -> Self {
        Self { bytes: Vec::new(), attributes: (0o755, 0, 0, 0) }
    }

    /// Mode, owner, group, time of the entries that follow.
    fn with(mut self, mode: u32, uid: u64, gid: u64, mtime: u64) -> Self {
        self.attributes = (mode, uid, gid, mtime);
        self
    }

    fn file(self, name: &str, data: &str) -> Self {
        self.raw(b'0', name, "", data.as_bytes())
    }

    fn directory(self, name: &str) -> Self {
        self.raw(b'5', name, "", &[])
    }

    fn symlink(self, name: &str, target: &str) -> Self {
        self.raw(b'2', name, target, &[])
    }

    fn link(self, name: &str, target: &str) -> Self {
        self.raw(b'1', name, target, &[])
    }

    /// An extended header for the next entry.
    fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut data = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let length =
                (1..).map(|digits| rest + digits).find(|l| l.to_string().len() + rest == *l).expect("one");
            data.extend_from_slice(format!("{length} {key}=").as_bytes());
            data.extend_from_slice(value);
            data.push(b'\n');
        }
        self.raw(b'x', "pax", "", &data)
    }

    fn raw(mut self, kind: u8, name: &str, link: &str, data: &[u8]) -> Self {
        let mut header = tar::Header::new_gnu();
        let (mode, uid, gid, mtime) = self.attributes;
        header.set_mode(mode);
        header.set_uid(uid);
        header.set_gid(gid);
        header.set_mtime(mtime);
        header.set_size(data.len() as u64);
        let block = header.as_mut_bytes();
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[156] = kind;
        block[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    fn bytes(&self) -> Vec<u8> {
        [&self.bytes[..], &[0; 1024]].concat()
    }
}

/// An OCI archive of one layer.
struct Archive;

impl Archive {
    fn of(layer: &Layer) -> Vec<u8> {
        let bytes = layer.bytes();
        Self::with(&bytes, &bytes)
    }

    fn gzipped(layer: &Layer) -> Vec<u8> {
        use std::io::Write;
        let bytes = layer.bytes();
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        encoder.write_all(&bytes).expect("memory");
        Self::with(&bytes, &encoder.finish().expect("memory"))
    }

    fn with(plain: &[u8], blob: &[u8]) -> Vec<u8> {
        let digest = |bytes: &[u8]| super::layout::digest_of(bytes);
        let mut out = Layer::new();
        let mut add = |bytes: &[u8]| {
            let name = format!("blobs/sha256/{}", digest(bytes).hex());
            out = out.clone().raw(b'0', &name, "", bytes);
            serde_json::json!({"digest": digest(bytes), "size": bytes.len(),
                "mediaType": "application/vnd.oci.image.layer.v1.tar"})
        };
        let layer = add(blob);
        let config = serde_json::json!({"os": "linux", "architecture": Machine::this().architecture,
            "rootfs": {"type": "layers", "diff_ids": [digest(plain)]}});
        let mut config = add(config.to_string().as_bytes());
        config["mediaType"] = "application/vnd.oci.image.config.v1+json".into();
        let manifest = serde_json::json!({"schemaVersion": 2, "config": config, "layers": [layer]});
        let mut manifest = add(manifest.to_string().as_bytes());
        manifest["mediaType"] = "application/vnd.oci.image.manifest.v1+json".into();
        manifest["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": "test:1"});
        let index = serde_json::json!({"schemaVersion": 2, "manifests": [manifest]}).to_string();
        out.raw(b'0', "index.json", "", index.as_bytes()).bytes()
    }
}

/// A store, as the worker sees it.
struct Store {
    directory: Directory,
    next: std::cell::Cell<u32>,
}

impl Store {
    fn new(path: &Path) -> Self {
        let directory = Directory::new(path.join("images"));
        directory.create().expect("made");
        Self { directory, next: std::cell::Cell::new(0) }
    }

    /// After a refusal nothing is in the store but what was there.
    fn import(&self, archive: &[u8], limits: Limits) -> Result<(), String> {
        let staging = self.directory.staging().join(format!("import-{}", self.next.get()));
        self.next.set(self.next.get() + 1);
        fs::create_dir(&staging).expect("made");
        let place = Place { directory: self.directory.clone(), staging: staging.clone() };
        let limits_of = crate::config::defaults::images().limits;
        let trust = super::trust::Trusted::everything();
        let job = Job { name: None, trust, limits: limits_of, source: Source::default(), ahead: false };
        let listing = |path: PathBuf| fs::read_dir(path).expect("there").count();
        let before = listing(self.directory.layers());

        let result = import(&place, &job, archive, limits, &mut |_| {});

        fs::remove_dir_all(staging).expect("removed");
        assert!(result.is_ok() || listing(self.directory.layers()) == before);
        result.map(drop).map_err(|error| error.to_string())
    }
}
