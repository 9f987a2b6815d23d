//! A disk in memory under SQLite that can lose power, fail, or be left as a kill leaves it.
//!
//! Each file has what is on the disk for good (`durable`) and what has been written since its last
//! sync. At a cut of the power each sector of that survives or not, in any combination; a file
//! whose name was not synced may be gone, one that was deleted may be back. The shared memory of
//! the WAL is gone in any case.

use rusqlite::ffi::{self, sqlite3_file, sqlite3_int64, sqlite3_io_methods, sqlite3_vfs};
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a disk writes whole or not at all.
const SECTOR: usize = 512;

#[derive(Clone, Debug, Default)]
pub struct File {
    now: Vec<u8>,
    durable: Vec<u8>,
    since: Vec<Change>,
    /// The name is there; and it is on the disk for good.
    exists: bool,
    name_durable: bool,
    /// Syncing it syncs its folder too, as SQLite does with what it makes beside a database.
    syncs_name: bool,
}

#[derive(Clone, Debug)]
enum Change {
    Write(usize, Vec<u8>),
    Truncate(usize),
}

impl Change {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Write(at, data) => write_at(bytes, *at, data),
            Self::Truncate(len) => bytes.resize(*len, 0),
        }
    }
}

fn write_at(bytes: &mut Vec<u8>, at: usize, data: &[u8]) {
    if bytes.len() < at + data.len() {
        bytes.resize(at + data.len(), 0);
    }
    bytes[at..at + data.len()].copy_from_slice(data);
}

/// What happens, counted in calls to the disk from now on.
#[derive(Clone, Copy, Debug)]
pub enum Plan {
    /// Nothing is written from that call on.
    Stop { at: u64 },
    /// So many calls fail with this code.
    Fail { at: u64, calls: u64, code: c_int },
}

#[derive(Default)]
struct State {
    files: BTreeMap<String, File>,
    shm: BTreeMap<String, Vec<Box<[u8; 32768]>>>,
    calls: u64,
    plan: Option<Plan>,
    stopped: bool,
    failed: u64,
}

impl State {
    /// Counts a call; an error code when it goes wrong.
    fn call(&mut self) -> Result<(), c_int> {
        self.calls += 1;
        match self.plan {
            Some(Plan::Stop { at }) if self.calls >= at => self.stopped = true,
            Some(Plan::Fail { at, calls, code }) if (at..at + calls).contains(&self.calls) => {
                self.failed += 1;
                return Err(code);
            }
            _ => {}
        }
        if self.stopped { Err(ffi::SQLITE_IOERR) } else { Ok(()) }
    }
}

type Shared = Arc<Mutex<State>>;

/// A handle; the VFS stays registered as long as the process.
#[derive(Clone)]
pub struct Disk {
    state: Shared,
    pub name: &'static str,
}

impl Disk {
    pub fn new() -> Self {
        Self::with(BTreeMap::new())
    }

    fn with(files: BTreeMap<String, File>) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = format!("cut-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let state = Arc::new(Mutex::new(State { files, ..State::default() }));
        register(&name, state.clone());
        Self { state, name: name.leak() }
    }

    pub fn plan(&self, plan: Option<Plan>) {
        let mut state = self.lock();
        let calls = state.calls;
        state.failed = 0;
        state.plan = plan.map(|plan| match plan {
            Plan::Stop { at } => Plan::Stop { at: calls + at },
            Plan::Fail { at, calls: n, code } => Plan::Fail { at: calls + at, calls: n, code },
        });
    }

    pub fn stopped(&self) -> bool {
        self.lock().stopped
    }

    /// How many calls went wrong by plan.
    pub fn failed(&self) -> u64 {
        self.lock().failed
    }

    /// As a kill leaves it: all that was written is there.
    pub fn after_kill(&self) -> Self {
        let mut files = self.lock().files.clone();
        files.retain(|_, file| file.exists);
        Self::with(files)
    }

    /// As a cut of the power leaves it.
    pub fn after_cut(&self, rng: &mut fastrand::Rng) -> Self {
        let mut files = self.lock().files.clone();
        files.retain(|_, file| {
            let there = if file.exists == file.name_durable { file.exists } else { rng.bool() };
            let survive = rng.choice([0.0, 0.5, 0.9, 1.0]).unwrap_or(0.5);
            let mut bytes = std::mem::take(&mut file.durable);
            for change in file.since.drain(..) {
                survives(&change, survive, rng, &mut bytes);
            }
            *file = File {
                now: bytes.clone(),
                durable: bytes,
                since: Vec::new(),
                exists: true,
                name_durable: true,
                syncs_name: file.syncs_name,
            };
            there
        });
        Self::with(files)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Frees what it holds: the registration stays for ever.
    pub fn clear(&self) {
        let mut state = self.lock();
        state.files.clear();
        state.stopped = true;
    }
}

fn survives(change: &Change, share: f64, rng: &mut fastrand::Rng, bytes: &mut Vec<u8>) {
    match change {
        Change::Write(at, data) => {
            let mut from = 0;
            while from < data.len() {
                // To the next border between sectors.
                let to = (from + SECTOR - (at + from) % SECTOR).min(data.len());
                if rng.f64() < share {
                    write_at(bytes, at + from, &data[from..to]);
                }
                from = to;
            }
        }
        Change::Truncate(_) if rng.f64() < share => change.apply(bytes),
        Change::Truncate(_) => {}
    }
}

fn lock(state: &Shared) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What SQLite holds of an open file.
#[repr(C)]
struct Open {
    base: sqlite3_file,
    /// Owned: made by `open`, freed by `close`.
    inner: *mut Inner,
}

struct Inner {
    state: Shared,
    name: String,
    delete_on_close: bool,
}

impl Inner {
    fn file(&self, run: impl FnOnce(&mut File) -> c_int) -> c_int {
        let mut state = lock(&self.state);
        match state.call() {
            Ok(()) => run(state.files.entry(self.name.clone()).or_default()),
            Err(code) => code,
        }
    }
}

fn register(name: &str, state: Shared) {
    let c_name = CString::new(name).expect("no NUL in it");
    let vfs = Box::new(sqlite3_vfs {
        iVersion: 1,
        szOsFile: size_of::<Open>() as c_int,
        mxPathname: 512,
        pNext: std::ptr::null_mut(),
        zName: c_name.into_raw(),
        pAppData: Box::into_raw(Box::new(state)).cast(),
        xOpen: Some(open),
        xDelete: Some(delete),
        xAccess: Some(access),
        xFullPathname: Some(full_path),
        xDlOpen: None,
        xDlError: None,
        xDlSym: None,
        xDlClose: None,
        xRandomness: Some(randomness),
        xSleep: Some(sleep),
        xCurrentTime: Some(current_time),
        xGetLastError: None,
        xCurrentTimeInt64: None,
        xSetSystemCall: None,
        xGetSystemCall: None,
        xNextSystemCall: None,
    });
    // SAFETY: the structure, its name and its state are leaked above, so they outlive SQLite's use.
    let code = unsafe { ffi::sqlite3_vfs_register(Box::into_raw(vfs), 0) };
    assert_eq!(code, ffi::SQLITE_OK);
}

static METHODS: sqlite3_io_methods = sqlite3_io_methods {
    iVersion: 2,
    xClose: Some(close),
    xRead: Some(read),
    xWrite: Some(write),
    xTruncate: Some(truncate),
    xSync: Some(sync),
    xFileSize: Some(file_size),
    xLock: Some(lock_file),
    xUnlock: Some(lock_file),
    xCheckReservedLock: Some(check_reserved),
    xFileControl: Some(control),
    xSectorSize: Some(sector_size),
    xDeviceCharacteristics: Some(characteristics),
    xShmMap: Some(shm_map),
    xShmLock: Some(shm_lock),
    xShmBarrier: Some(shm_barrier),
    xShmUnmap: Some(shm_unmap),
    xFetch: None,
    xUnfetch: None,
};

/// # Safety
/// `vfs` is one that `register` made.
unsafe fn state_of<'a>(vfs: *mut sqlite3_vfs) -> &'a Shared {
    // SAFETY: `register` stored a leaked `Shared` there.
    unsafe { &*(*vfs).pAppData.cast::<Shared>() }
}

/// # Safety
/// `file` was opened by `open` and not yet closed.
unsafe fn inner<'a>(file: *mut sqlite3_file) -> &'a Inner {
    // SAFETY: `open` stored a leaked `Inner` there, which only `close` frees.
    unsafe { &*(*file.cast::<Open>()).inner }
}

/// # Safety
/// `name` is NULL or a C string that lives through the call.
unsafe fn text(name: *const c_char) -> String {
    if name.is_null() {
        return format!("temporary-{}", fastrand::u64(..));
    }
    // SAFETY: it is a C string, by this function's contract.
    unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
}

unsafe extern "C" fn open(
    vfs: *mut sqlite3_vfs,
    name: *const c_char,
    file: *mut sqlite3_file,
    flags: c_int,
    out: *mut c_int,
) -> c_int {
    // SAFETY: SQLite calls this with its own structures: the VFS we registered, a name or NULL, and
    // room of szOsFile bytes for the file.
    unsafe {
        (*file).pMethods = std::ptr::null();
        let (state, name) = (state_of(vfs).clone(), text(name));
        {
            let mut disk = lock(&state);
            if let Err(code) = disk.call() {
                return code;
            }
            let known = disk.files.entry(name.clone()).or_default();
            if !known.exists {
                known.exists = true;
                known.now.clear();
                known.since.push(Change::Truncate(0));
                known.syncs_name = flags & (ffi::SQLITE_OPEN_WAL | ffi::SQLITE_OPEN_MAIN_JOURNAL) != 0;
                // The store makes the database's file itself, and syncs the folder.
                known.name_durable |= flags & ffi::SQLITE_OPEN_MAIN_DB != 0;
            }
        }
        let delete_on_close = flags & ffi::SQLITE_OPEN_DELETEONCLOSE != 0;
        (*file.cast::<Open>()).inner = Box::into_raw(Box::new(Inner { state, name, delete_on_close }));
        (*file).pMethods = &METHODS;
        if !out.is_null() {
            *out = flags;
        }
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn close(file: *mut sqlite3_file) -> c_int {
    // SAFETY: SQLite closes each file once; `open` made the `Inner`.
    let inner = unsafe { Box::from_raw((*file.cast::<Open>()).inner) };
    if inner.delete_on_close {
        lock(&inner.state).files.remove(&inner.name);
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn read(file: *mut sqlite3_file, to: *mut c_void, len: c_int, at: sqlite3_int64) -> c_int {
    // SAFETY: SQLite gives room for `len` bytes, and an open file.
    let (inner, to) = unsafe { (inner(file), std::slice::from_raw_parts_mut(to.cast::<u8>(), len as usize)) };
    inner.file(|file| {
        let from = file.now.get(at as usize..).unwrap_or_default();
        let there = from.len().min(to.len());
        to[..there].copy_from_slice(&from[..there]);
        to[there..].fill(0);
        if there < to.len() { ffi::SQLITE_IOERR_SHORT_READ } else { ffi::SQLITE_OK }
    })
}

unsafe extern "C" fn write(
    file: *mut sqlite3_file,
    data: *const c_void,
    len: c_int,
    at: sqlite3_int64,
) -> c_int {
    // SAFETY: SQLite gives `len` bytes, and an open file.
    let (inner, data) = unsafe { (inner(file), std::slice::from_raw_parts(data.cast::<u8>(), len as usize)) };
    let mut state = lock(&inner.state);
    let before = state.stopped;
    let code = state.call();
    let stops = state.stopped && !before;
    let file = state.files.entry(inner.name.clone()).or_default();
    // The write that the power fails in may be on the disk in part.
    if code.is_ok() || stops {
        file.since.push(Change::Write(at as usize, data.to_vec()));
    }
    match code {
        Ok(()) => {
            write_at(&mut file.now, at as usize, data);
            ffi::SQLITE_OK
        }
        Err(code @ (ffi::SQLITE_FULL | ffi::SQLITE_NOMEM)) => code,
        Err(_) => ffi::SQLITE_IOERR_WRITE,
    }
}

unsafe extern "C" fn truncate(file: *mut sqlite3_file, size: sqlite3_int64) -> c_int {
    // SAFETY: an open file.
    unsafe { inner(file) }.file(|file| {
        file.now.resize(size as usize, 0);
        file.since.push(Change::Truncate(size as usize));
        ffi::SQLITE_OK
    })
}

unsafe extern "C" fn sync(file: *mut sqlite3_file, _flags: c_int) -> c_int {
    // SAFETY: an open file.
    unsafe { inner(file) }.file(|file| {
        for change in std::mem::take(&mut file.since) {
            change.apply(&mut file.durable);
        }
        file.name_durable |= file.syncs_name;
        ffi::SQLITE_OK
    })
}

unsafe extern "C" fn file_size(file: *mut sqlite3_file, size: *mut sqlite3_int64) -> c_int {
    // SAFETY: an open file, and room for the answer.
    unsafe {
        inner(file).file(|file| {
            *size = file.now.len() as sqlite3_int64;
            ffi::SQLITE_OK
        })
    }
}

/// One connection at a time: there is nobody to lock out.
unsafe extern "C" fn lock_file(_file: *mut sqlite3_file, _level: c_int) -> c_int {
    ffi::SQLITE_OK
}

unsafe extern "C" fn check_reserved(_file: *mut sqlite3_file, out: *mut c_int) -> c_int {
    // SAFETY: room for the answer.
    unsafe { *out = 0 };
    ffi::SQLITE_OK
}

unsafe extern "C" fn control(_file: *mut sqlite3_file, _op: c_int, _arg: *mut c_void) -> c_int {
    ffi::SQLITE_NOTFOUND
}

unsafe extern "C" fn sector_size(_file: *mut sqlite3_file) -> c_int {
    4096
}

/// As SQLite assumes of any disk on Unix: a write harms nothing beside it.
unsafe extern "C" fn characteristics(_file: *mut sqlite3_file) -> c_int {
    ffi::SQLITE_IOCAP_POWERSAFE_OVERWRITE
}

unsafe extern "C" fn shm_map(
    file: *mut sqlite3_file,
    region: c_int,
    size: c_int,
    extend: c_int,
    out: *mut *mut c_void,
) -> c_int {
    assert_eq!(size, 32768);
    // SAFETY: an open file, and room for the answer. A region is boxed, so that it stays where it
    // is until it is unmapped.
    unsafe {
        let inner = inner(file);
        let mut state = lock(&inner.state);
        let regions = state.shm.entry(inner.name.clone()).or_default();
        while regions.len() <= region as usize && extend != 0 {
            regions.push(Box::new([0; 32768]));
        }
        *out = regions
            .get_mut(region as usize)
            .map_or(std::ptr::null_mut(), |region| region.as_mut_ptr().cast());
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn shm_lock(_file: *mut sqlite3_file, _at: c_int, _n: c_int, _flags: c_int) -> c_int {
    ffi::SQLITE_OK
}

unsafe extern "C" fn shm_barrier(_file: *mut sqlite3_file) {}

unsafe extern "C" fn shm_unmap(file: *mut sqlite3_file, _delete: c_int) -> c_int {
    // SAFETY: an open file, whose regions nobody uses any more.
    let inner = unsafe { inner(file) };
    lock(&inner.state).shm.remove(&inner.name);
    ffi::SQLITE_OK
}

unsafe extern "C" fn delete(vfs: *mut sqlite3_vfs, name: *const c_char, sync_folder: c_int) -> c_int {
    // SAFETY: our VFS, and a name.
    let (state, name) = unsafe { (state_of(vfs), text(name)) };
    let mut state = lock(state);
    if let Err(code) = state.call() {
        return code;
    }
    if let Some(file) = state.files.get_mut(&name) {
        file.exists = false;
        file.name_durable &= sync_folder == 0;
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn access(
    vfs: *mut sqlite3_vfs,
    name: *const c_char,
    _flags: c_int,
    out: *mut c_int,
) -> c_int {
    // SAFETY: our VFS, a name, and room for the answer.
    unsafe {
        let (state, name) = (state_of(vfs), text(name));
        *out = lock(state).files.get(&name).is_some_and(|file| file.exists).into();
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn full_path(
    _vfs: *mut sqlite3_vfs,
    name: *const c_char,
    room: c_int,
    out: *mut c_char,
) -> c_int {
    // SAFETY: a name, and `room` bytes for the answer, which is checked.
    unsafe {
        let bytes = CStr::from_ptr(name).to_bytes_with_nul();
        assert!(bytes.len() <= room as usize);
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), out.cast(), bytes.len());
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn randomness(_vfs: *mut sqlite3_vfs, len: c_int, out: *mut c_char) -> c_int {
    // SAFETY: room for `len` bytes.
    unsafe { std::slice::from_raw_parts_mut(out.cast::<u8>(), len as usize) }.fill_with(|| fastrand::u8(..));
    len
}

unsafe extern "C" fn sleep(_vfs: *mut sqlite3_vfs, microseconds: c_int) -> c_int {
    microseconds
}

unsafe extern "C" fn current_time(_vfs: *mut sqlite3_vfs, out: *mut f64) -> c_int {
    // SAFETY: room for the answer.
    unsafe { *out = 2_461_000.5 };
    ffi::SQLITE_OK
}
