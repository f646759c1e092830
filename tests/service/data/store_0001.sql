BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0001');
CREATE TABLE api_keys (
	id VARCHAR(40) NOT NULL, 
	hash VARCHAR(64) NOT NULL, 
	name VARCHAR(80) NOT NULL, 
	created_at FLOAT NOT NULL, 
	PRIMARY KEY (id), 
	UNIQUE (hash)
);
INSERT INTO "api_keys" VALUES('key_01M8BHTST9Q4H61P96Q48363PK','3d71ba73ce93410973c0e45f1eb97e676347b535402c83306935bd14e8746daa','first',1.79568413268115973473e+09);
CREATE TABLE artifacts (
	job_id VARCHAR(40) NOT NULL, 
	name VARCHAR(255) NOT NULL, 
	path TEXT NOT NULL, 
	bytes BIGINT, 
	sha256 VARCHAR(64), 
	created_at FLOAT NOT NULL, 
	PRIMARY KEY (job_id, name), 
	FOREIGN KEY(job_id) REFERENCES jobs (id)
);
INSERT INTO "artifacts" VALUES('ftjob_01M8BHTSTF7FBDQ56J7K91PM6D','model.safetensors','/x/model.safetensors',3,'00',1760000040.0);
CREATE TABLE attempts (
	job_id VARCHAR(40) NOT NULL, 
	n INTEGER NOT NULL, 
	token VARCHAR(40) NOT NULL, 
	submission_id VARCHAR(80) NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	events_offset BIGINT NOT NULL, 
	created_at FLOAT NOT NULL, 
	ended_at FLOAT, 
	PRIMARY KEY (job_id, n), 
	FOREIGN KEY(job_id) REFERENCES jobs (id), 
	UNIQUE (submission_id)
);
INSERT INTO "attempts" VALUES('ftjob_01M8BHTSTF7FBDQ56J7K91PM6D',1,'5ef33f256d8c6ff663d849b98380dd36','job-ftjob_01M8BHTSTF7FBDQ56J7K91PM6D-a1','settled',50,1.79568413271234130854e+09,1.79568413274525809286e+09);
INSERT INTO "attempts" VALUES('ftjob_01M8BHTSWHWZ89QGGCQS1CWRKA',1,'035bc022190c4b7093afa397cfb2ebb1','job-ftjob_01M8BHTSWHWZ89QGGCQS1CWRKA-a1','submitted',10,1.79568413276544451714e+09,NULL);
CREATE TABLE events (
	job_id VARCHAR(40) NOT NULL, 
	seq INTEGER NOT NULL, 
	attempt INTEGER NOT NULL, 
	run_seq BIGINT, 
	type VARCHAR(40) NOT NULL, 
	level VARCHAR(10) NOT NULL, 
	message TEXT NOT NULL, 
	data JSON NOT NULL, 
	created_at FLOAT NOT NULL, 
	PRIMARY KEY (job_id, seq), 
	FOREIGN KEY(job_id) REFERENCES jobs (id)
);
INSERT INTO "events" VALUES('ftjob_01M8BHTSTF7FBDQ56J7K91PM6D',1,0,NULL,'job.created','info','the request passed its checks','{}',1.79568413269396162028e+09);
INSERT INTO "events" VALUES('ftjob_01M8BHTSTF7FBDQ56J7K91PM6D',2,0,NULL,'job.status','info','validating → queued','{"from": "validating", "to": "queued"}',1.79568413269406986238e+09);
INSERT INTO "events" VALUES('ftjob_01M8BHTSTF7FBDQ56J7K91PM6D',3,1,NULL,'job.status','info','attempt 1 begins','{"from": "queued", "to": "planning"}',1.79568413271246027948e+09);
INSERT INTO "events" VALUES('ftjob_01M8BHTSTF7FBDQ56J7K91PM6D',4,1,NULL,'job.status','info','the cluster has taken the attempt','{"from": "planning", "to": "starting"}',1.79568413272329926487e+09);
INSERT INTO "events" VALUES('ftjob_01M8BHTSTF7FBDQ56J7K91PM6D',5,1,10,'job.status','info','starting → running','{"from": "starting", "to": "running"}',1760000010.0);
INSERT INTO "events" VALUES('ftjob_01M8BHTSTF7FBDQ56J7K91PM6D',6,1,20,'metrics','info','','{"step": 1, "total_steps": 4, "loss": 2.0, "step_seconds": 0.5}',1760000020.0);
INSERT INTO "events" VALUES('ftjob_01M8BHTSTF7FBDQ56J7K91PM6D',7,1,30,'plan.created','info','','{"plan_version": 1, "window": 0, "compute_fraction": null, "bytes_fraction": null, "step_seconds": 5e-06, "idle_share": null}',1760000030.0);
INSERT INTO "events" VALUES('ftjob_01M8BHTSTF7FBDQ56J7K91PM6D',8,1,40,'artifact.ready','info','','{"name": "model.safetensors", "path": "/x/model.safetensors", "bytes": 3, "sha256": "00"}',1760000040.0);
INSERT INTO "events" VALUES('ftjob_01M8BHTSTF7FBDQ56J7K91PM6D',9,1,45,'ledger','info','','{"rows": []}',1760000045.0);
INSERT INTO "events" VALUES('ftjob_01M8BHTSTF7FBDQ56J7K91PM6D',10,1,50,'job.status','info','running → succeeded','{"from": "running", "to": "succeeded"}',1760000050.0);
INSERT INTO "events" VALUES('ftjob_01M8BHTSWHWZ89QGGCQS1CWRKA',1,0,NULL,'job.created','info','the request passed its checks','{}',1795684132.75475);
INSERT INTO "events" VALUES('ftjob_01M8BHTSWHWZ89QGGCQS1CWRKA',2,0,NULL,'job.status','info','validating → queued','{"from": "validating", "to": "queued"}',1.79568413275481176378e+09);
INSERT INTO "events" VALUES('ftjob_01M8BHTSWHWZ89QGGCQS1CWRKA',3,1,NULL,'job.status','info','attempt 1 begins','{"from": "queued", "to": "planning"}',1.79568413276552867885e+09);
INSERT INTO "events" VALUES('ftjob_01M8BHTSWHWZ89QGGCQS1CWRKA',4,1,NULL,'job.status','info','the cluster has taken the attempt','{"from": "planning", "to": "starting"}',1.79568413276792526248e+09);
INSERT INTO "events" VALUES('ftjob_01M8BHTSWHWZ89QGGCQS1CWRKA',5,1,10,'job.status','info','starting → running','{"from": "starting", "to": "running"}',1760000010.0);
INSERT INTO "events" VALUES('ftjob_01M8BHTSXCJAV131A8QKQQ0D52',1,0,NULL,'job.created','info','the request passed its checks','{}',1.79568413278108906746e+09);
INSERT INTO "events" VALUES('ftjob_01M8BHTSXCJAV131A8QKQQ0D52',2,0,NULL,'job.status','info','validating → queued','{"from": "validating", "to": "queued"}',1.79568413278114485734e+09);
CREATE TABLE jobs (
	id VARCHAR(40) NOT NULL, 
	owner VARCHAR(40) NOT NULL, 
	idempotency_key VARCHAR(255), 
	fingerprint VARCHAR(64) NOT NULL, 
	spec JSON NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	status_reason TEXT, 
	attempt INTEGER NOT NULL, 
	last_seq INTEGER NOT NULL, 
	live JSON, 
	estimate JSON, 
	error JSON, 
	"plan" JSON, 
	ledger JSON, 
	created_at FLOAT NOT NULL, 
	started_at FLOAT, 
	finished_at FLOAT, 
	PRIMARY KEY (id)
);
INSERT INTO "jobs" VALUES('ftjob_01M8BHTSTF7FBDQ56J7K91PM6D','key_01M8BHTST9Q4H61P96Q48363PK','once','b12d89503bd88df7c74d702d9b72175f6f8dad083acf15b6b9866651fbdd112d','{"name": "old and done", "model": "d2ft_digits", "model_args": {}, "weights": null, "img_size": null, "dataset": "digits", "images_per_class": null, "method": {"type": "d2ft", "ratios": null, "budgets": null, "schedule": [], "strategy": null, "hold": null, "grain": null, "score": null, "skip_fill": null}, "optimiser": {"learning_rate": null, "weight_decay": 0.05, "betas": [0.9, 0.999], "warmup_fraction": 0.1, "clip_norm": 1.0, "label_smoothing": 0.0}, "workers": 2, "micro_batches": 5, "micro_batch_size": 16, "epochs": 3.0, "steps": 4, "window": 100, "placement": "auto", "train_embed": true, "seed": 0, "metadata": {"team": "vision", "run": "7"}}','succeeded',NULL,1,10,'{"metrics": {"step": 1, "total_steps": 4, "loss": 2.0, "step_seconds": 0.5}, "steps_seen": 1, "compute_fraction_sum": 0.0, "compute_fraction_count": 0, "bytes_fraction_sum": 0.0, "bytes_fraction_count": 0, "step_seconds_sum": 0.5, "step_seconds_count": 1, "step_average": 0.5}','{"plan_version": 1, "window": 0, "compute_fraction": null, "bytes_fraction": null, "step_seconds": 5e-06, "idle_share": null}',NULL,'{"version": 1, "window": 0, "forecast": {"step_us": 5}}','{"rows": []}',1.79568413269192290312e+09,1.79568413271229887009e+09,1760000050.0);
INSERT INTO "jobs" VALUES('ftjob_01M8BHTSWHWZ89QGGCQS1CWRKA','key_01M8BHTST9Q4H61P96Q48363PK',NULL,'17c3cf363bcdf3df2c64287ea24fcd868c8478cac0a76d27e02ced0ea9ec922d','{"name": "old and running", "model": "d2ft_digits", "model_args": {}, "weights": null, "img_size": null, "dataset": "digits", "images_per_class": null, "method": {"type": "d2ft", "ratios": null, "budgets": null, "schedule": [], "strategy": null, "hold": null, "grain": null, "score": null, "skip_fill": null}, "optimiser": {"learning_rate": null, "weight_decay": 0.05, "betas": [0.9, 0.999], "warmup_fraction": 0.1, "clip_norm": 1.0, "label_smoothing": 0.0}, "workers": 2, "micro_batches": 5, "micro_batch_size": 16, "epochs": 3.0, "steps": 9, "window": 100, "placement": "auto", "train_embed": true, "seed": 0, "metadata": {}}','running',NULL,1,5,NULL,NULL,NULL,NULL,NULL,1.79568413275421333305e+09,1.79568413276541066171e+09,NULL);
INSERT INTO "jobs" VALUES('ftjob_01M8BHTSXCJAV131A8QKQQ0D52','key_01M8BHTST9Q4H61P96Q48363PK',NULL,'d895a480ccbb47907c4653354fc727f176c46534441dc245920a3464c3e2b882','{"name": "old and waiting", "model": "vit_small_patch16_224", "model_args": {}, "weights": null, "img_size": null, "dataset": "digits", "images_per_class": null, "method": {"type": "d2ft", "ratios": null, "budgets": null, "schedule": [], "strategy": null, "hold": null, "grain": null, "score": null, "skip_fill": null}, "optimiser": {"learning_rate": null, "weight_decay": 0.05, "betas": [0.9, 0.999], "warmup_fraction": 0.1, "clip_norm": 1.0, "label_smoothing": 0.0}, "workers": 2, "micro_batches": 5, "micro_batch_size": 16, "epochs": 3.0, "steps": 2, "window": 100, "placement": "auto", "train_embed": true, "seed": 0, "metadata": {}}','queued',NULL,0,2,NULL,NULL,NULL,NULL,NULL,1.79568413278055238726e+09,NULL,NULL);
CREATE TABLE metrics (
	job_id VARCHAR(40) NOT NULL, 
	step INTEGER NOT NULL, 
	"values" JSON NOT NULL, 
	PRIMARY KEY (job_id, step), 
	FOREIGN KEY(job_id) REFERENCES jobs (id)
);
INSERT INTO "metrics" VALUES('ftjob_01M8BHTSTF7FBDQ56J7K91PM6D',1,'{"step": 1, "total_steps": 4, "loss": 2.0, "step_seconds": 0.5}');
CREATE INDEX ix_jobs_created ON jobs (created_at, id);
CREATE INDEX ix_jobs_state ON jobs (state, created_at);
CREATE UNIQUE INDEX ux_jobs_idempotency ON jobs (owner, idempotency_key);
CREATE INDEX ix_attempts_state ON attempts (state);
CREATE UNIQUE INDEX ux_events_run ON events (job_id, attempt, run_seq);
COMMIT;
