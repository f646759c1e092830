BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0003');
CREATE TABLE api_keys (
	id VARCHAR(40) NOT NULL, 
	hash VARCHAR(64) NOT NULL, 
	name VARCHAR(80) NOT NULL, 
	created_at FLOAT NOT NULL, user_id VARCHAR(40) DEFAULT 'user_first' NOT NULL, hint VARCHAR(16) DEFAULT '' NOT NULL, scopes JSON DEFAULT '["read", "write", "admin"]' NOT NULL, expires_at FLOAT, revoked_at FLOAT, used_at FLOAT, 
	PRIMARY KEY (id), 
	UNIQUE (hash)
);
INSERT INTO "api_keys" VALUES('key_01M8CVB52GKERMSM3B62GP8XZQ','3d71ba73ce93410973c0e45f1eb97e676347b535402c83306935bd14e8746daa','first',1.79572766011287593846e+09,'user_first','d2ft_old_','["read", "write", "admin"]',NULL,NULL,NULL);
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
INSERT INTO "attempts" VALUES('ftjob_01M8CVB52VBQMRMRSRRWW9WMG8',1,'run_l9gCX1oxR3mN0vHvnXQPT1VcORm_cnNF','job-ftjob_01M8CVB52VBQMRMRSRRWW9WMG8-a1','settled',4,1.79572766015905904766e+09,1.79572766019183659548e+09);
INSERT INTO "attempts" VALUES('ftjob_01M8CVB55H0X29J2YFNQ400M0Q',1,'run_7fRIYTpav6VHLDgVN-joQfzmtUWngEa4','job-ftjob_01M8CVB55H0X29J2YFNQ400M0Q-a1','submitted',1,1.7957276602185587883e+09,NULL);
CREATE TABLE checkpoints (
	job_id VARCHAR(40) NOT NULL, 
	name VARCHAR(80) NOT NULL, 
	attempt INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	path TEXT NOT NULL, 
	bytes BIGINT, 
	sha256 VARCHAR(64), 
	created_at FLOAT NOT NULL, 
	PRIMARY KEY (job_id, name), 
	FOREIGN KEY(job_id) REFERENCES jobs (id)
);
CREATE TABLE datasets (
	id VARCHAR(40) NOT NULL, 
	owner VARCHAR(40) NOT NULL, 
	name VARCHAR(80) NOT NULL, 
	uri TEXT NOT NULL, 
	summary JSON NOT NULL, 
	created_at FLOAT NOT NULL, 
	PRIMARY KEY (id)
);
CREATE TABLE deliveries (
	id VARCHAR(40) NOT NULL, 
	webhook_id VARCHAR(40) NOT NULL, 
	body JSON NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	tries INTEGER NOT NULL, 
	next_at FLOAT NOT NULL, 
	last_error TEXT, 
	created_at FLOAT NOT NULL, 
	sent_at FLOAT, 
	PRIMARY KEY (id), 
	FOREIGN KEY(webhook_id) REFERENCES webhooks (id)
);
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
INSERT INTO "events" VALUES('ftjob_01M8CVB52VBQMRMRSRRWW9WMG8',1,0,NULL,'job.created','info','the request passed its checks','{}',1.79572766012344694139e+09);
INSERT INTO "events" VALUES('ftjob_01M8CVB52VBQMRMRSRRWW9WMG8',2,0,NULL,'job.status','info','validating → queued','{"from": "validating", "to": "queued"}',1.79572766012344694139e+09);
INSERT INTO "events" VALUES('ftjob_01M8CVB52VBQMRMRSRRWW9WMG8',3,1,NULL,'job.status','info','attempt 1 begins','{"from": "queued", "to": "planning"}',1.7957276601591756344e+09);
INSERT INTO "events" VALUES('ftjob_01M8CVB52VBQMRMRSRRWW9WMG8',4,1,NULL,'job.status','info','the cluster has taken the attempt','{"from": "planning", "to": "starting"}',1.79572766016952252389e+09);
INSERT INTO "events" VALUES('ftjob_01M8CVB52VBQMRMRSRRWW9WMG8',5,1,1,'job.status','info','starting → running','{"from": "starting", "to": "running"}',1.7957276601790354252e+09);
INSERT INTO "events" VALUES('ftjob_01M8CVB52VBQMRMRSRRWW9WMG8',6,1,2,'metrics','info','','{"step": 4, "total_steps": 4, "loss": 1.0}',1.79572766017918133735e+09);
INSERT INTO "events" VALUES('ftjob_01M8CVB52VBQMRMRSRRWW9WMG8',7,1,3,'ledger','info','','{"rows": []}',1.79572766017922544473e+09);
INSERT INTO "events" VALUES('ftjob_01M8CVB52VBQMRMRSRRWW9WMG8',8,1,4,'job.status','info','running → succeeded','{"from": "running", "to": "succeeded"}',1.79572766018550777434e+09);
INSERT INTO "events" VALUES('ftjob_01M8CVB55H0X29J2YFNQ400M0Q',1,0,NULL,'job.created','info','the request passed its checks','{}',1.79572766020917820931e+09);
INSERT INTO "events" VALUES('ftjob_01M8CVB55H0X29J2YFNQ400M0Q',2,0,NULL,'job.status','info','validating → queued','{"from": "validating", "to": "queued"}',1.79572766020917820931e+09);
INSERT INTO "events" VALUES('ftjob_01M8CVB55H0X29J2YFNQ400M0Q',3,1,NULL,'job.status','info','attempt 1 begins','{"from": "queued", "to": "planning"}',1.79572766021865582461e+09);
INSERT INTO "events" VALUES('ftjob_01M8CVB55H0X29J2YFNQ400M0Q',4,1,NULL,'job.status','info','the cluster has taken the attempt','{"from": "planning", "to": "starting"}',1.795727660221408844e+09);
INSERT INTO "events" VALUES('ftjob_01M8CVB55H0X29J2YFNQ400M0Q',5,1,1,'job.status','info','starting → running','{"from": "starting", "to": "running"}',1.79572766022638797764e+09);
INSERT INTO "events" VALUES('ftjob_01M8CVB56GEGNNC20B036HJD66',1,0,NULL,'job.created','info','the request passed its checks','{}',1.79572766024090671541e+09);
INSERT INTO "events" VALUES('ftjob_01M8CVB56GEGNNC20B036HJD66',2,0,NULL,'job.status','info','validating → queued','{"from": "validating", "to": "queued"}',1.79572766024090671541e+09);
CREATE TABLE job_labels (
	job_id VARCHAR(40) NOT NULL, 
	"key" VARCHAR(64) NOT NULL, 
	value VARCHAR(512) NOT NULL, 
	PRIMARY KEY (job_id, "key"), 
	FOREIGN KEY(job_id) REFERENCES jobs (id)
);
INSERT INTO "job_labels" VALUES('ftjob_01M8CVB52VBQMRMRSRRWW9WMG8','team','vision');
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
	finished_at FLOAT, model VARCHAR(200) DEFAULT '' NOT NULL, search TEXT DEFAULT '' NOT NULL, trace VARCHAR(64), priority INTEGER DEFAULT '0' NOT NULL, queued_at FLOAT, queue_deadline FLOAT, want VARCHAR(16), requeue BOOLEAN DEFAULT 0 NOT NULL, faults INTEGER DEFAULT '0' NOT NULL, stuck INTEGER DEFAULT '0' NOT NULL, lost_step INTEGER, 
	PRIMARY KEY (id)
);
INSERT INTO "jobs" VALUES('ftjob_01M8CVB52VBQMRMRSRRWW9WMG8','user_first',NULL,'419b9d583559783f1e0be40a80feb99434b30122eb1936878df80888773d7303','{"name": "done", "model": "d2ft_digits", "model_args": {}, "weights": null, "img_size": null, "dataset": "digits", "images_per_class": null, "augment": {"flip": false, "crop_scale": null, "randaugment": null, "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}, "method": {"type": "d2ft", "ratios": null, "budgets": null, "schedule": [], "strategy": null, "hold": null, "grain": null, "score": null, "skip_fill": null, "lora": null, "freeze": null, "head_only": false}, "optimiser": {"learning_rate": null, "weight_decay": 0.05, "betas": [0.9, 0.999], "warmup_fraction": 0.1, "clip_norm": 1.0, "label_smoothing": 0.0}, "workers": 2, "min_workers": null, "micro_batches": 5, "micro_batch_size": 16, "epochs": 3.0, "steps": 4, "window": 100, "placement": "auto", "train_embed": true, "checkpoint": {"every_s": 300.0, "every_steps": null, "keep": 2, "evaluate": false}, "export": {"onnx": false, "tensorboard": true}, "seed": 0, "priority": 0, "queue_timeout_s": null, "metadata": {"team": "vision"}}','succeeded',NULL,1,8,'{"metrics": {"step": 4, "total_steps": 4, "loss": 1.0}, "steps_seen": 1, "compute_fraction_sum": 0.0, "compute_fraction_count": 0, "bytes_fraction_sum": 0.0, "bytes_fraction_count": 0, "step_seconds_sum": 0.0, "step_seconds_count": 0, "step_average": null}',NULL,NULL,NULL,'{"rows": []}',1.79572766012344694139e+09,1.79572766015900111202e+09,1.79572766017929887766e+09,'d2ft_digits','ftjob_01m8cvb52vbqmrmrsrrww9wmg8
done
d2ft_digits
digits
vision',NULL,0,1.79572766012344694139e+09,NULL,NULL,0,0,0,NULL);
INSERT INTO "jobs" VALUES('ftjob_01M8CVB55H0X29J2YFNQ400M0Q','user_first',NULL,'6cf7fe44a5c6fde166d669cfb96bf6dd5cf38c6001f482a9f32a3b6480f87ba7','{"name": "running", "model": "d2ft_digits", "model_args": {}, "weights": null, "img_size": null, "dataset": "digits", "images_per_class": null, "augment": {"flip": false, "crop_scale": null, "randaugment": null, "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}, "method": {"type": "d2ft", "ratios": null, "budgets": null, "schedule": [], "strategy": null, "hold": null, "grain": null, "score": null, "skip_fill": null, "lora": null, "freeze": null, "head_only": false}, "optimiser": {"learning_rate": null, "weight_decay": 0.05, "betas": [0.9, 0.999], "warmup_fraction": 0.1, "clip_norm": 1.0, "label_smoothing": 0.0}, "workers": 2, "min_workers": null, "micro_batches": 5, "micro_batch_size": 16, "epochs": 3.0, "steps": 4, "window": 100, "placement": "auto", "train_embed": true, "checkpoint": {"every_s": 300.0, "every_steps": null, "keep": 2, "evaluate": false}, "export": {"onnx": false, "tensorboard": true}, "seed": 0, "priority": 0, "queue_timeout_s": null, "metadata": {}}','running',NULL,1,5,NULL,NULL,NULL,NULL,NULL,1.79572766020917820931e+09,1.79572766021850466731e+09,NULL,'d2ft_digits','ftjob_01m8cvb55h0x29j2yfnq400m0q
running
d2ft_digits
digits',NULL,0,1.79572766020917820931e+09,NULL,NULL,0,0,0,NULL);
INSERT INTO "jobs" VALUES('ftjob_01M8CVB56GEGNNC20B036HJD66','user_first',NULL,'101b7fdf2a28574e024e9eb514be66ed09a5a0879acb4ac1e9f897a877725ab4','{"name": "waiting", "model": "d2ft_digits", "model_args": {}, "weights": null, "img_size": null, "dataset": "digits", "images_per_class": null, "augment": {"flip": false, "crop_scale": null, "randaugment": null, "erasing": 0.0, "mixup": 0.0, "cutmix": 0.0}, "method": {"type": "d2ft", "ratios": null, "budgets": null, "schedule": [], "strategy": null, "hold": null, "grain": null, "score": null, "skip_fill": null, "lora": null, "freeze": null, "head_only": false}, "optimiser": {"learning_rate": null, "weight_decay": 0.05, "betas": [0.9, 0.999], "warmup_fraction": 0.1, "clip_norm": 1.0, "label_smoothing": 0.0}, "workers": 2, "min_workers": null, "micro_batches": 5, "micro_batch_size": 16, "epochs": 3.0, "steps": 4, "window": 100, "placement": "auto", "train_embed": true, "checkpoint": {"every_s": 300.0, "every_steps": null, "keep": 2, "evaluate": false}, "export": {"onnx": false, "tensorboard": true}, "seed": 0, "priority": 0, "queue_timeout_s": null, "metadata": {}}','queued',NULL,0,2,NULL,NULL,NULL,NULL,NULL,1.79572766024090671541e+09,NULL,NULL,'d2ft_digits','ftjob_01m8cvb56gegnnc20b036hjd66
waiting
d2ft_digits
digits',NULL,0,1.79572766024090671541e+09,NULL,NULL,0,0,0,NULL);
CREATE TABLE leases (
	name VARCHAR(40) NOT NULL, 
	holder VARCHAR(80) NOT NULL, 
	until FLOAT NOT NULL, 
	PRIMARY KEY (name)
);
CREATE TABLE metrics (
	job_id VARCHAR(40) NOT NULL, 
	step INTEGER NOT NULL, 
	"values" JSON NOT NULL, 
	PRIMARY KEY (job_id, step), 
	FOREIGN KEY(job_id) REFERENCES jobs (id)
);
INSERT INTO "metrics" VALUES('ftjob_01M8CVB52VBQMRMRSRRWW9WMG8',4,'{"step": 4, "total_steps": 4, "loss": 1.0}');
CREATE TABLE users (
	id VARCHAR(40) NOT NULL, 
	name VARCHAR(80) NOT NULL, 
	role VARCHAR(16) NOT NULL, 
	max_queued INTEGER, 
	max_running INTEGER, 
	max_priority INTEGER DEFAULT '0' NOT NULL, 
	share FLOAT DEFAULT '1' NOT NULL, 
	usage_s FLOAT DEFAULT '0' NOT NULL, 
	usage_at FLOAT DEFAULT '0' NOT NULL, 
	created_at FLOAT NOT NULL, 
	disabled_at FLOAT, 
	PRIMARY KEY (id), 
	UNIQUE (name)
);
INSERT INTO "users" VALUES('user_first','admin','admin',NULL,NULL,100,1.0,8.0096721649169921875e-02,1.79572766019910740856e+09,1.79572766004323744774e+09,NULL);
CREATE TABLE webhooks (
	id VARCHAR(40) NOT NULL, 
	owner VARCHAR(40) NOT NULL, 
	url TEXT NOT NULL, 
	types JSON NOT NULL, 
	created_at FLOAT NOT NULL, 
	disabled_at FLOAT, 
	PRIMARY KEY (id)
);
CREATE INDEX ix_jobs_created ON jobs (created_at, id);
CREATE INDEX ix_jobs_state ON jobs (state, created_at);
CREATE UNIQUE INDEX ux_jobs_idempotency ON jobs (owner, idempotency_key);
CREATE INDEX ix_attempts_state ON attempts (state);
CREATE UNIQUE INDEX ux_events_run ON events (job_id, attempt, run_seq);
CREATE INDEX ix_api_keys_user ON api_keys (user_id);
CREATE INDEX ix_jobs_owner ON jobs (owner, created_at, id);
CREATE INDEX ix_jobs_queue ON jobs (state, owner, priority, queued_at);
CREATE INDEX ix_job_labels ON job_labels ("key", value, job_id);
CREATE UNIQUE INDEX ux_datasets_name ON datasets (owner, name);
CREATE INDEX ix_webhooks_owner ON webhooks (owner);
CREATE INDEX ix_deliveries_due ON deliveries (state, next_at);
CREATE INDEX ix_deliveries_webhook ON deliveries (webhook_id);
CREATE INDEX ix_attempts_token ON attempts (token);
COMMIT;
