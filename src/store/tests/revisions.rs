//! Laws of rollbacks: back to the revision before, under a new number, with the reason.

use super::*;

fn deploy(fixture: &Fixture, manifest: &str, image: &str) -> u32 {
    let stored = wait(fixture.store.deploy(function("f"), manifest.into(), image.into(), None));
    stored.expect("deploys").revision.number
}

#[test]
fn rollback_is_a_new_revision_of_the_old_content() {
    let fixture = Fixture::new();
    deploy(&fixture, "old", "image-1");
    deploy(&fixture, "new", "image-2");
    assert_eq!(wait(fixture.store.history(function("f"))).expect("reads").rolled_back, None);

    let back = wait(fixture.store.roll_back(function("f"), "it failed".into())).expect("rolls back");

    assert_eq!((back.revision.number, back.revision.manifest.as_str()), (3, "old"));
    assert_eq!(back.revision.image, "image-1");
    let (fixture, _) = fixture.kill();
    let history = wait(fixture.store.history(function("f"))).expect("reads");
    assert_eq!(history.rolled_back, Some((2, "it failed".to_owned())));
    assert!(history.proven);
    let before = history.previous.expect("the one that failed");
    assert_eq!((before.number, before.image.as_str()), (2, "image-2"));
    let mut pinned = wait(fixture.store.images_pinned()).expect("lists");
    pinned.sort();
    assert_eq!(pinned, ["image-1", "image-2"]);
}

#[test]
fn first_revision_has_nothing_before_it() {
    let fixture = Fixture::new();
    deploy(&fixture, "only", "image-1");

    let refused = wait(fixture.store.roll_back(function("f"), String::new()));

    assert!(matches!(refused, Err(StoreError::NotFound)));
    assert!(matches!(wait(fixture.store.roll_back(function("g"), String::new())), Err(StoreError::NotFound)));
}

#[test]
fn notes_go_with_what_they_are_about() {
    let fixture = Fixture::new();
    deploy(&fixture, "a", "image-1");
    deploy(&fixture, "b", "image-2");
    wait(fixture.store.roll_back(function("f"), "x".repeat(5000))).expect("rolls back");
    let reason = wait(fixture.store.history(function("f"))).expect("reads").rolled_back.expect("noted").1;
    assert_eq!(reason.len(), 1024);

    let number = deploy(&fixture, "c", "image-3");
    wait(fixture.store.mark_proven(function("f"), number)).expect("marks");
    let history = wait(fixture.store.history(function("f"))).expect("reads");
    assert_eq!((history.rolled_back, history.proven), (None, true));
    let number = deploy(&fixture, "d", "image-4");
    wait(fixture.store.mark_proven(function("f"), number)).expect("marks");

    let conn = rusqlite::Connection::open(fixture.path()).expect("opens");
    let notes = conn.query_row("SELECT count(*) FROM revision_notes", [], |row| row.get(0));
    assert_eq!(notes, Ok(2));
}
