//! Who may do what.

use hypeman_tests::{Claims, Server, mint, mint_with};
use serde_json::{Value, json};

fn claims(pairs: &[(&str, Value)]) -> Claims {
    pairs
        .iter()
        .map(|(name, value)| ((*name).to_owned(), value.clone()))
        .collect()
}

#[tokio::test]
async fn only_good_tokens_are_accepted() {
    let server = Server::start().await;
    let secret = server.secret();
    let attempt = async |token: Option<&str>| server.client().with_token(token).get("/instances").await;
    let good = mint(secret, None);
    assert_eq!(attempt(Some(&good)).await.status, 200);
    assert_eq!(
        attempt(None).await.expect(401).json()["message"],
        "authorization header required"
    );

    let hour_ago = json!(1_000_000_000);
    let unsigned = {
        let payload = good.split('.').nth(1).unwrap();
        // {"alg":"none"}
        format!("eyJhbGciOiJub25lIn0.{payload}.")
    };
    let cases = [
        ("nonsense", "nonsense".to_owned()),
        ("empty", String::new()),
        ("alg none", unsigned),
        (
            "other secret",
            mint("another-secret-another-secret-another", None),
        ),
        ("expired", mint_with(secret, claims(&[("exp", hour_ago)]))),
        ("cut off", good[..good.len() - 2].to_owned()),
        (
            "registry token",
            mint_with(
                secret,
                claims(&[("repos", json!(["a"])), ("scope", json!("push"))]),
            ),
        ),
        (
            "build token",
            mint_with(secret, claims(&[("build_id", json!("b"))])),
        ),
        (
            "builder",
            mint_with(secret, claims(&[("sub", json!("builder-1"))])),
        ),
    ];
    for (name, token) in cases {
        let reply = attempt(Some(&token)).await;
        assert_eq!(reply.status, 401, "{name}: {}", reply.text());
        assert_eq!(reply.json()["code"], "Unauthorized", "{name}");
    }
    let request = server.client().with_token(None);
    let basic = request
        .request(reqwest::Method::GET, "/instances")
        .header("authorization", "Basic eDp5");
    assert_eq!(
        request.send(basic).await.expect(401).json()["message"],
        "invalid authorization header format"
    );
    let lower = request
        .request(reqwest::Method::GET, "/instances")
        .header("authorization", format!("bEaReR {good}"));
    assert_eq!(
        request.send(lower).await.status,
        200,
        "the scheme's case does not matter"
    );
    assert!(!server.log().contains(&good), "no token in the log");
}

#[tokio::test]
async fn scopes_limit_a_token() {
    let server = Server::start().await;
    let with = |scopes: &[&str]| {
        server
            .client()
            .with_token(Some(&mint(server.secret(), Some(scopes))))
    };
    let reader = with(&["instance:read"]);
    assert_eq!(reader.get("/instances").await.status, 200);
    let refused = reader
        .post("/instances", &json!({"name": "x", "image": "y"}))
        .await
        .expect(403)
        .json();
    assert_eq!(
        refused,
        json!({"code": "Forbidden", "message": "missing required scope: instance:write"})
    );
    assert_eq!(reader.get("/images").await.status, 403);
    assert_eq!(reader.get("/resources").await.status, 403);
    assert_eq!(reader.delete("/instances/x").await.status, 403);
    assert_eq!(
        with(&["instance:delete"]).delete("/instances/x").await.status,
        404
    );
    assert_eq!(with(&["image:read"]).get("/images").await.status, 200);
    assert_eq!(with(&["image:write"]).get("/images").await.status, 403);
    assert_eq!(with(&["*"]).get("/images").await.status, 200);
    assert_eq!(
        with(&[]).get("/instances").await.status,
        403,
        "an empty list allows nothing"
    );
    assert_eq!(with(&["resource:read"]).get("/health").await.status, 200);
}
