//! What can go wrong in the store, and how SQLite's codes become something a caller can act on.

use super::{Listed, Unreadable};
use rusqlite::ffi;

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// `[buffer] max_bytes` is reached: nothing was stored.
    #[error("the buffer is full ([buffer] max_bytes, max_events)")]
    Full,
    /// It would not fit even if nothing else waited: asking again can't help.
    #[error("{bytes} bytes are more than the buffer can ever hold, {bytes_max} ([buffer] max_bytes)")]
    TooLarge { bytes: u64, bytes_max: u64 },
    /// The file system has no room: nothing was stored.
    #[error("the disk is full")]
    DiskFull,
    #[error("no such entry")]
    NotFound,
    /// Every function has an id range of its own, and all are taken.
    #[error("no room for another function: a node has at most {0}")]
    TooManyFunctions(u32),
    #[error(
        "the database was written by neap {written_by}, and neap {readable_by} or newer can read it: \
         install that, or move neap.db and neap.db-wal out of the data directory to start with an \
         empty one"
    )]
    TooNew { written_by: String, readable_by: String },
    #[error("{doing}")]
    Sqlite {
        doing: &'static str,
        #[source]
        source: rusqlite::Error,
    },
    #[error("{doing}")]
    Io {
        doing: &'static str,
        #[source]
        source: std::io::Error,
    },
    /// Pages that contradict each other, in SQLite's words.
    #[error("the database is damaged: {0}")]
    Damaged(String),
    #[error("the store has stopped")]
    Stopped,
}

impl StoreError {
    /// As SQLite would have said it.
    pub(super) fn out_of_memory(doing: &'static str) -> Self {
        let source = rusqlite::Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_NOMEM), None);
        Self::Sqlite { doing, source }
    }

    /// The same again, for each member of a group whose commit failed.
    pub(super) fn again(&self) -> Self {
        match self {
            Self::Full => Self::Full,
            Self::TooLarge { bytes, bytes_max } => Self::TooLarge { bytes: *bytes, bytes_max: *bytes_max },
            Self::DiskFull => Self::DiskFull,
            Self::NotFound => Self::NotFound,
            Self::TooManyFunctions(max) => Self::TooManyFunctions(*max),
            Self::TooNew { written_by, readable_by } => {
                Self::TooNew { written_by: written_by.clone(), readable_by: readable_by.clone() }
            }
            Self::Sqlite { doing, source } => {
                let source = match source {
                    rusqlite::Error::SqliteFailure(code, text) => {
                        rusqlite::Error::SqliteFailure(*code, text.clone())
                    }
                    other => rusqlite::Error::SqliteFailure(
                        ffi::Error::new(ffi::SQLITE_ERROR),
                        Some(other.to_string()),
                    ),
                };
                Self::Sqlite { doing, source }
            }
            Self::Io { doing, source } => Self::Io { doing, source: source.kind().into() },
            Self::Damaged(what) => Self::Damaged(what.clone()),
            Self::Stopped => Self::Stopped,
        }
    }

    /// A page, or a value of a kind that neap never writes.
    pub(super) fn is_damage(&self) -> bool {
        let value = matches!(self, Self::Sqlite { source, .. } if is_unreadable(source));
        self.is_broken() || value || matches!(self, Self::Damaged(_))
    }

    /// A page: what stands there can't be reached any more, and going on makes it worse.
    /// A table that is gone is one whose definition can't be read: the statements are neap's own.
    pub(super) fn is_broken(&self) -> bool {
        let codes = [ffi::ErrorCode::DatabaseCorrupt, ffi::ErrorCode::NotADatabase];
        let schema = matches!(self, Self::Sqlite { source, .. } if source.to_string().contains("no such "));
        schema || self.code().is_some_and(|code| codes.contains(&code))
    }

    pub(super) fn may_be_full_disk(&self) -> bool {
        let io = matches!(self, Self::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull);
        let sqlite = matches!(self.code(), Some(ffi::ErrorCode::DiskFull | ffi::ErrorCode::SystemIoFailure));
        io || sqlite || matches!(self, Self::DiskFull)
    }

    /// SQLite's primary result code, when it was SQLite that failed.
    pub(super) fn code(&self) -> Option<ffi::ErrorCode> {
        match self {
            Self::Sqlite { source, .. } => source.sqlite_error_code(),
            _ => None,
        }
    }
}

/// The page can be read, and what stands there is nothing that neap writes: a bit has flipped.
pub(super) fn is_unreadable(error: &rusqlite::Error) -> bool {
    use rusqlite::Error;
    matches!(
        error,
        Error::FromSqlConversionFailure(..)
            | Error::Utf8Error(..)
            | Error::InvalidColumnType(..)
            | Error::IntegralValueOutOfRange(..)
    )
}

/// For a listing: a row that can't be read is one of its rows.
pub(super) fn listed<T>(id: i64, read: rusqlite::Result<T>) -> rusqlite::Result<Listed<T>> {
    match read {
        Ok(row) => Ok(Ok(row)),
        Err(error) if is_unreadable(&error) => Ok(Err(Unreadable { id, why: crate::errors::chain(&error) })),
        Err(error) => Err(error),
    }
}

/// Says what was being done when SQLite failed.
pub(super) trait Doing<T> {
    fn doing(self, doing: &'static str) -> Result<T, StoreError>;
}

impl<T> Doing<T> for Result<T, rusqlite::Error> {
    fn doing(self, doing: &'static str) -> Result<T, StoreError> {
        self.map_err(|source| StoreError::Sqlite { doing, source })
    }
}

impl<T> Doing<T> for Result<T, std::io::Error> {
    fn doing(self, doing: &'static str) -> Result<T, StoreError> {
        self.map_err(|source| StoreError::Io { doing, source })
    }
}
